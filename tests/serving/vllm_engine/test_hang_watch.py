"""An engine that does not answer in time is ended; a slow one and a stopped machine are not."""

import asyncio
import time
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from adakv_serve.serving.vllm_engine.hang_watch import HangWatch


class Engine:
    """Answers as long as the test does not hold it up."""

    def __init__(self) -> None:
        self.works = asyncio.Event()
        self.works.set()
        self.answers: asyncio.Queue[None] = asyncio.Queue()
        self.ended = asyncio.Event()
        self.error: Exception | None = None

    async def ask(self) -> None:
        await self.works.wait()
        self.answers.put_nowait(None)
        if self.error is not None:
            raise self.error

    async def answer_again(self) -> None:
        while not self.answers.empty():
            self.answers.get_nowait()
        # The second one is of a later question.
        for _ in range(2):
            await self.answers.get()


@pytest_asyncio.fixture
async def engine() -> AsyncIterator[Engine]:
    engine = Engine()
    async with asyncio.timeout(60):
        yield engine


async def test_an_engine_that_does_not_answer_is_ended_and_unhealthy(engine: Engine) -> None:
    watch = HangWatch(engine.ask, engine.ended.set, hang_s=0.2)
    watch.start()
    watch.check()
    await engine.answer_again()
    engine.works.clear()
    await engine.ended.wait()
    assert watch.hung
    assert watch.silent
    with pytest.raises(RuntimeError, match="hung"):
        watch.check()


@pytest.mark.parametrize("error", [None, RuntimeError("engines returned different results")])
async def test_an_engine_that_answers_is_healthy(engine: Engine, error: Exception | None) -> None:
    engine.error = error
    watch = HangWatch(engine.ask, engine.ended.set, hang_s=60, tick_s=0.001)
    watch.start()
    for _ in range(3):
        await engine.answer_again()
    watch.check()
    assert not watch.silent
    watch.stop()


async def test_an_engine_is_silent_before_it_counts_as_hung_and_may_answer_then(
    engine: Engine,
) -> None:
    watch = HangWatch(engine.ask, engine.ended.set, hang_s=3, tick_s=0.001)
    engine.works.clear()
    watch.start()
    while not watch.silent:
        await asyncio.sleep(0.01)
    assert not watch.hung
    engine.works.set()
    await engine.answer_again()
    assert not watch.silent
    watch.check()
    watch.stop()


async def test_time_in_which_this_process_was_stopped_does_not_count(engine: Engine) -> None:
    watch = HangWatch(engine.ask, engine.ended.set, hang_s=1, tick_s=0.2)
    engine.works.clear()
    watch.start()
    await asyncio.sleep(0)
    # As a stopped process does nothing; the engine was stopped as well.
    time.sleep(1.5)
    engine.works.set()
    await engine.answer_again()
    watch.check()
    assert not engine.ended.is_set()
    watch.stop()


async def test_an_engine_that_nothing_watches_is_unhealthy(engine: Engine) -> None:
    watch = HangWatch(engine.ask, engine.ended.set, hang_s=60)
    watch.start()
    watch.stop()
    await asyncio.sleep(0)
    with pytest.raises(RuntimeError, match="nothing watches"):
        watch.check()
