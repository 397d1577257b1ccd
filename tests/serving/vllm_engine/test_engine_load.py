"""The load of real engines: failed and aborted requests leave nothing behind."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.exceptions import EngineGenerateError

from adakv_serve.serving.vllm_engine.load import CacheSize, EngineLoad, LoadStats
from tests.adakv_worker.async_engines import Side
from tests.adakv_worker.engines import prompt

pytestmark = pytest.mark.asyncio(loop_scope="module")


class Watched:
    """An engine and the statistics of its load."""

    def __init__(self, model: Path, compressing: bool) -> None:
        self._stats = LoadStats(on_proof=lambda proof: None)
        self.side = Side(model, compressing=compressing, loggers=[self._stats.logger])
        self._stats.sent = self.side.llm.sent

    def load(self) -> EngineLoad:
        return self._stats.load(CacheSize(100, 32))

    async def reports(self, running: int, waiting: int) -> None:
        """Waits for a load of so many requests."""
        async with asyncio.timeout(60):
            while (self.load().running, self.load().waiting) != (running, waiting):
                self._stats.changed.clear()
                await self._stats.changed.wait()

    async def refuses(self, **options: Any) -> None:
        """Asks for what cannot be sent to the engine's process."""
        given = {"prompt_token_ids": prompt(300, seed=1)}
        outputs = self.side.llm.generate(
            given, SamplingParams(**options), "refused", session_id="\ud83d"
        )
        with pytest.raises(EngineGenerateError):
            await anext(outputs)


@pytest_asyncio.fixture(
    loop_scope="module", scope="module", params=[True, False], ids=["compressing", "stock"]
)
async def engine(
    request: pytest.FixtureRequest, in_process: None, gqa_model: Path
) -> AsyncIterator[Watched]:
    engine = Watched(gqa_model, request.param)
    yield engine
    engine.side.llm.shutdown()


def is_nothing(load: EngineLoad) -> bool:
    return (load.running, load.waiting, load.prefill_tokens_queued, load.waiting_blocks) == (0,) * 4


@pytest.mark.parametrize("choices", [1, 3])
async def test_requests_that_cannot_be_sent_count_nowhere(engine: Watched, choices: int) -> None:
    before = engine.load()
    for _ in range(5):
        await engine.refuses(n=choices)
    assert is_nothing(engine.load())
    assert engine.load().blocks_free == before.blocks_free
    assert not engine.side.llm.output_processor.has_unfinished_requests()
    client = engine.side.ask(2)
    await client.task
    assert len(client.tokens) == 60
    await engine.reports(0, 0)


async def test_the_load_is_zero_after_the_last_client_has_left(engine: Watched) -> None:
    client = engine.side.ask(3, max_tokens=1000)
    await client.has(3)
    await engine.reports(1, 0)
    assert engine.load().blocks_free < 100
    client.task.cancel()
    await asyncio.wait([client.task])
    await engine.reports(0, 0)
    assert is_nothing(engine.load())
    assert engine.load().blocks_free == 100


async def test_requests_count_from_when_they_are_sent(engine: Watched) -> None:
    clients = [engine.side.ask(text, max_tokens=30) for text in range(4, 7)]
    sent = engine.side.llm.sent
    while len(sent.unanswered()) < 3:
        await asyncio.sleep(0)
    load = engine.load()
    assert load.running + load.waiting == 3
    assert load.prefill_tokens_queued == 900
    await asyncio.gather(*(client.task for client in clients))
    await engine.reports(0, 0)
    assert is_nothing(engine.load())
