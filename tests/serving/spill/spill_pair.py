"""A borrower and its lender over a real ledger, without Ray: the way between them is a seam."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adakv_serve.router.ledger.redis_ledger import LedgerKeys
from adakv_serve.router.lending.redis_leases import LendingLedger
from adakv_serve.router.lending.spill_plan import SpillLimits
from adakv_serve.serving.spill.borrower import Borrower
from adakv_serve.serving.spill.lender import Lender
from adakv_serve.serving.spill.move import MoveReport, Send, SpillSettings
from adakv_serve.serving.supervision import Supervisor
from adakv_serve.serving.vllm_engine.load import EngineLoad
from tests.adakv_worker.async_engines import Side, idle

KEYS = LedgerKeys("test", "app")
LOAD = EngineLoad(
    block_size_tokens=32, blocks_total=200, blocks_free=200, blocks_evictable=0,
    blocks_compressed=0, blocks_uncompressed=0, blocks_reserved_growth=0, running=0, waiting=0,
    waiting_blocks=0, prefill_tokens_queued=0, decode_tokens_per_s=0.0, achieved_compression=1.0,
    preemptions=0,
)  # fmt: skip
# Four layers, two KV heads, 32 tokens of 32 numbers.
BLOCK_BYTES = 2 * 4 * 2 * 32 * 32 * 4


class Pair:
    """A borrower that is short of blocks once `load` says so, and its lender."""

    def __init__(self, here: Side, there: Side, url: str, folder: Path) -> None:
        self.here, self.there, self.folder = here, there, folder
        self.load = self.lender_load = LOAD
        self.reports: list[MoveReport] = []
        self.send: Send = lambda guest: self.lender.take_in(guest)
        self.ledger = LendingLedger(url, KEYS)
        self.lender = Lender(
            core=there.core, load=lambda: self.lender_load, ledger=self.ledger, replica_id="lender",
            cache_kind="",            share=0.5, folder=folder, park_bytes=1 << 24, max_requests=64,
        )  # fmt: skip
        self.borrower = Borrower(
            core=here.core, load=lambda: self.load, ledger=self.ledger, replica_id="borrower",
            cache_kind="",            send=lambda guest: self.send(guest), block_bytes=BLOCK_BYTES,
            settings=SpillSettings(
                SpillLimits(worth=0.0001, overhead_s=0.0), interval_s=0.05, expected_tokens=64,
                prefill_tokens_per_s=500.0, first_output_s=60.0, parked_s=60.0,
                bytes_per_s=1e9, folder=folder,
            ),
            tasks=Supervisor(),
            on_move=self.reports.append,
        )  # fmt: skip

    def is_short_of(self, blocks: int) -> None:
        self.load = LOAD._replace(blocks_free=0, waiting=1, waiting_blocks=blocks)

    async def ends(self) -> None:
        """Nothing is left on either side, or in the ledger."""
        self.load = LOAD
        assert await idle(self.here)
        assert await idle(self.there)
        async with asyncio.timeout(60):
            while (
                (await self.ledger.read()).leases
                or self.lender.lent_blocks
                or self.borrower.borrowed_blocks
            ):
                await asyncio.sleep(0.05)


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def away(pair: Pair) -> None:
    await until(lambda: pair.here.core.away)
