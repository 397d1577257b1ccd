"""Background tasks start again, are counted, and make a process unhealthy if they cannot go on."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

import pytest

from adakv_serve.serving.supervision import Patience, Supervisor, TaskFailing

# Failed tasks start again at once, and no run is long enough to count as working.
AT_ONCE = Patience(first_pause_s=0.0, most_failures=3, steady_s=1e9)


class Watched:
    """A supervisor whose failures the test counts."""

    def __init__(self, patience: Patience) -> None:
        self.failures: list[str] = []
        self.tasks = Supervisor(self.failures.append, patience)

    def is_healthy(self) -> bool:
        try:
            self.tasks.check()
        except TaskFailing:
            return False
        return True


@pytest.fixture
async def watched() -> AsyncIterator[Watched]:
    watched = Watched(AT_ONCE)
    yield watched
    await watched.tasks.stop()


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not check():
            await asyncio.sleep(0)


class Work:
    """Fails as often as the test sets, and then goes on for ever."""

    def __init__(self, failures: float, error: BaseException | None = None) -> None:
        self.left = failures
        self.error = error or ZeroDivisionError("a bug")
        self.begun = 0
        self.is_working = False

    async def run(self) -> None:
        self.begun += 1
        if self.begun <= self.left:
            raise self.error
        self.is_working = True
        await asyncio.Event().wait()


async def test_a_task_that_fails_is_logged_counted_and_started_again(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work(failures=2)
    watched.tasks.keep("work", work.run)
    await until(lambda: work.is_working)
    assert watched.failures == ["work", "work"]
    assert watched.is_healthy()
    logged = [record for record in caplog.records if "task=work" in record.getMessage()]
    assert [record.levelno for record in logged] == [logging.ERROR] * 2
    assert all(record.exc_info and record.exc_info[1] is work.error for record in logged)


async def test_a_cancellation_that_nobody_asked_for_is_a_failure(watched: Watched) -> None:
    work = Work(failures=1, error=asyncio.CancelledError("by a library"))
    watched.tasks.keep("work", work.run)
    await until(lambda: work.is_working)
    assert watched.failures == ["work"]


async def test_a_task_that_fails_for_ever_makes_its_process_unhealthy(watched: Watched) -> None:
    good, bad = Work(failures=0), Work(failures=float("inf"))
    watched.tasks.keep("good", good.run)
    watched.tasks.keep("bad", bad.run)
    await until(lambda: not watched.is_healthy())
    assert len(watched.failures) >= AT_ONCE.most_failures
    with pytest.raises(TaskFailing, match=r"^background tasks fail: bad: ZeroDivisionError"):
        watched.tasks.check()
    # It is still tried, and what works goes on.
    begun = bad.begun
    await until(lambda: bad.begun > begun)
    assert good.is_working


async def test_a_task_that_works_again_makes_its_process_healthy_again() -> None:
    watched = Watched(AT_ONCE._replace(steady_s=0.05))
    work = Work(failures=float("inf"))
    watched.tasks.keep("work", work.run)
    await until(lambda: not watched.is_healthy())
    work.left = 0
    await until(watched.is_healthy)
    assert work.is_working
    await watched.tasks.stop()


async def test_failures_of_a_task_that_works_in_between_are_not_in_a_row() -> None:
    watched = Watched(AT_ONCE._replace(steady_s=0.0))
    watched.tasks.keep("work", Work(failures=float("inf")).run)
    await until(lambda: len(watched.failures) > 3 * AT_ONCE.most_failures)
    assert watched.is_healthy()
    await watched.tasks.stop()


async def test_pauses_grow_up_to_the_longest(caplog: pytest.LogCaptureFixture) -> None:
    watched = Watched(AT_ONCE._replace(first_pause_s=0.001, longest_pause_s=0.004))
    watched.tasks.keep("work", Work(failures=5).run)
    await until(lambda: len(watched.failures) == 5)
    await watched.tasks.stop()
    pauses = [record.args[2] for record in caplog.records if isinstance(record.args, tuple)]
    assert pauses == [0.001, 0.002, 0.004, 0.004, 0.004]


async def test_a_stopped_task_has_ended(watched: Watched) -> None:
    ended = asyncio.Event()

    async def swallow_the_first_cancellation() -> None:
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.Event().wait()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    task = watched.tasks.keep("work", swallow_the_first_cancellation)
    await asyncio.sleep(0)
    async with asyncio.timeout(60):
        await task.stop()
    assert ended.is_set()
    assert not watched.failures


async def test_a_task_that_fails_while_it_is_stopped_does_not_start_again(
    watched: Watched,
) -> None:
    begun = 0

    async def fail_at_the_end() -> None:
        nonlocal begun
        begun += 1
        try:
            await asyncio.Event().wait()
        finally:
            raise OSError("cannot say goodbye")

    task = watched.tasks.keep("work", fail_at_the_end)
    await asyncio.sleep(0)
    await task.stop()
    assert begun == 1


async def test_a_task_that_returns_is_done(watched: Watched) -> None:
    work = 0

    async def run() -> None:
        nonlocal work
        work += 1

    await watched.tasks.keep("work", run).ended()
    assert (work, watched.failures) == (1, [])
    assert watched.is_healthy()


async def test_a_task_without_a_second_start_is_logged_and_counted(
    watched: Watched, caplog: pytest.LogCaptureFixture
) -> None:
    work = Work(failures=1)
    await asyncio.wait([watched.tasks.once("move", work.run())])
    assert (watched.failures, work.begun) == (["move"], 1)
    assert watched.is_healthy()
    assert "task=move" in caplog.text
    assert "a bug" in caplog.text


async def test_all_tasks_end_with_their_supervisor(watched: Watched) -> None:
    kept, single = Work(failures=0), Work(failures=0)
    watched.tasks.keep("kept", kept.run)
    task = watched.tasks.once("single", single.run())
    await until(lambda: kept.is_working and single.is_working)
    await watched.tasks.stop()
    assert task.cancelled()
    assert not watched.failures
