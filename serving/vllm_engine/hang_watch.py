"""Notices an engine that hangs, and ends it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

logger = logging.getLogger("ray.serve")

# Share of the longest time without an answer after which an engine counts as silent.
_SILENT_SHARE = 1 / 3


class HangWatch:
    """Asks an engine over and over whether it is there. It answers between two steps.

    Only time in which this process runs counts: a stopped machine that goes on has not hung.
    """

    def __init__(
        self,
        ask: Callable[[], Awaitable[object]],
        end: Callable[[], None],
        hang_s: float,
        tick_s: float = 1.0,
    ) -> None:
        """
        Args:
            ask: returns when the engine has answered; raises if the engine is dead.
            end: ends the engine's processes, whatever they do.
            hang_s: longest time without an answer, longer than any step.
            tick_s: time between two questions, and between two looks for an answer.
        """
        self._ask = ask
        self._end = end
        self._tick_s = min(tick_s, hang_s / 4)
        self._most_ticks = hang_s / self._tick_s
        self._ticks = 0
        self._task: asyncio.Task[None] | None = None
        self.hung = False

    @property
    def silent(self) -> bool:
        """Whether the engine has not answered for long, so that its statistics are old."""
        return self.hung or self._ticks >= self._most_ticks * _SILENT_SHARE

    def check(self) -> None:
        """Raise RuntimeError if the engine hung or nothing watches it any more."""
        if self.hung:
            raise RuntimeError("the engine hung and was ended")
        if self._task is None or self._task.done():
            raise RuntimeError("nothing watches the engine for hangs")

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._watch())

    def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while await self._answers():
            self._ticks = 0
            await asyncio.sleep(self._tick_s)
        self.hung = True
        logger.error("the engine has not answered for %.0f s: ended", self._ticks * self._tick_s)
        self._end()

    async def _answers(self) -> bool:
        """Return whether the engine answers in time, with an error or without."""
        answer = asyncio.ensure_future(self._ask())
        try:
            while self._ticks < self._most_ticks:
                await asyncio.wait([answer], timeout=self._tick_s)
                if answer.done():
                    if (error := answer.exception()) is not None:
                        # A dead engine has a check of its own.
                        logger.info("the engine answers with an error: %r", error)
                    return True
                self._ticks += 1
            return False
        finally:
            answer.cancel()
