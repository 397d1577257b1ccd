"""Background tasks of a process: logged when they fail, started again, counted, part of health."""

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import NamedTuple

logger = logging.getLogger("ray.serve")


class TaskFailing(RuntimeError):
    """A background task fails each time it is started."""


class Patience(NamedTuple):
    """When failed tasks start again, and how many failures in a row make a process unhealthy.

    first_pause_s, longest_pause_s: pause after a failure, which doubles with each one in a row.
    steady_s: a task that has run for so long works, whatever was before.
    """

    first_pause_s: float = 0.1
    longest_pause_s: float = 10.0
    most_failures: int = 8
    steady_s: float = 10.0


class KeptTask:
    """A task that starts again whenever it fails, until it returns or is stopped."""

    def __init__(
        self,
        name: str,
        run: Callable[[], Awaitable[None]],
        patience: Patience,
        on_failure: Callable[[str], None],
    ) -> None:
        self.name = name
        self._run = run
        self._patience = patience
        self._on_failure = on_failure
        # Those in a row.
        self._failures = 0
        # None while it does not run.
        self._began_s: float | None = None
        self.error: BaseException | None = None
        self._task = asyncio.get_running_loop().create_task(self._keep(), name=name)

    @property
    def is_failing(self) -> bool:
        """Whether it has failed too often in a row, and has not worked since."""
        return self._failures >= self._patience.most_failures and not self._is_steady()

    def _is_steady(self) -> bool:
        if self._began_s is None:
            return False
        return time.monotonic() - self._began_s >= self._patience.steady_s

    def cancel(self) -> None:
        """Stop the task soon."""
        self._task.cancel()

    async def stop(self) -> None:
        """Stop the task, and return once it has ended."""
        while not self._task.done():
            # Some libraries swallow a cancellation.
            self._task.cancel()
            await asyncio.wait([self._task], timeout=1.0)

    async def ended(self) -> None:
        """Return once the task has returned or is stopped."""
        await asyncio.wait([self._task])

    async def _keep(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        while True:
            self._began_s = time.monotonic()
            try:
                await self._run()
                return
            # A library can raise the latter, though nobody has cancelled this task.
            except (Exception, asyncio.CancelledError) as error:
                if task.cancelling():
                    raise asyncio.CancelledError from error
                pause_s = self._note(error)
            await asyncio.sleep(pause_s)

    def _note(self, error: BaseException) -> float:
        """Count and log a failure; return the pause before the next start."""
        if self._is_steady():
            self._failures = 0
        self._began_s, self.error = None, error
        patience = self._patience
        doubled = math.ldexp(patience.first_pause_s, min(self._failures, 32))
        pause_s = min(doubled, patience.longest_pause_s)
        self._failures += 1
        logger.error(
            "background task failed: task=%s in_a_row=%d starts_again_in_s=%.1f",
            self.name, self._failures, pause_s, exc_info=error,
        )  # fmt: skip
        self._on_failure(self.name)
        return pause_s


class Supervisor:
    """Runs the background tasks of one process, for one event loop.

    A task that fails is logged with its traceback, counted, and started again after a pause.
    `check` is part of the process' health check.
    """

    def __init__(
        self,
        on_failure: Callable[[str], None] = lambda name: None,
        patience: Patience | None = None,
    ) -> None:
        """
        Args:
            on_failure: called with a task's name at each of its failures.
        """
        self._on_failure = on_failure
        self._patience = patience or Patience()
        self._kept: set[KeptTask] = set()
        self._once: set[asyncio.Task[None]] = set()

    def keep(self, name: str, run: Callable[[], Awaitable[None]]) -> KeptTask:
        """Start a task that is to go on until it returns or is stopped.

        Args:
            run: called again after each failure. It returns only when its work is over.
        """
        kept = KeptTask(name, run, self._patience, self._on_failure)
        self._kept.add(kept)
        kept._task.add_done_callback(lambda task: self._kept.discard(kept))
        return kept

    def once(self, name: str, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Start a task that nobody waits for and that is not started again."""
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._once.add(task)
        task.add_done_callback(self._note_end)
        return task

    def _note_end(self, task: asyncio.Task[None]) -> None:
        self._once.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            logger.error("background task failed: task=%s", task.get_name(), exc_info=error)
            self._on_failure(task.get_name())

    def check(self) -> None:
        """Raise TaskFailing if a task that is to go on fails again and again."""
        failing = [f"{kept.name}: {kept.error!r}" for kept in self._kept if kept.is_failing]
        if failing:
            raise TaskFailing(f"background tasks fail: {'; '.join(sorted(failing))}")

    async def stop(self) -> None:
        """Stop all tasks, and return once they have ended."""
        for task in self._once:
            task.cancel()
        await asyncio.gather(*(kept.stop() for kept in list(self._kept)))
        await asyncio.gather(*self._once, return_exceptions=True)
