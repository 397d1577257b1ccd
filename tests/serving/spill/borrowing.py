"""A borrower with one request and lenders of a test's own making, without an engine."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from adakv_serve.router.lending.leases import Offer
from adakv_serve.router.lending.redis_leases import LendingLedger
from adakv_serve.router.lending.spill_plan import SpillLimits
from adakv_serve.serving.spill.borrower import Borrower
from adakv_serve.serving.spill.move import MoveReport, SpillSettings
from adakv_serve.serving.spill.parcels import Guest
from adakv_serve.serving.supervision import Supervisor
from adakv_serve.serving.vllm_engine.load import EngineLoad
from adakv_worker.messages import StateRefused
from tests.adakv_worker.frontend.stub_core import Front
from tests.adakv_worker.proofs import make_proof
from tests.serving.spill.spill_pair import LOAD

PROMPT = list(range(300))
SHORT = LOAD._replace(blocks_free=0, waiting=1, waiting_blocks=1)
# Running requests are about to be preempted.
PRESSING = LOAD._replace(blocks_free=0, running=1)
Batches = AsyncGenerator[list[EngineCoreOutput], None]


class Borrowing:
    """A borrower with one compressed request, which a test sends to a lender of its own making."""

    def __init__(self, ledger: LendingLedger, folder: Path, **changes: Any) -> None:
        self.front = Front()
        self.front.core.answer = [[*PROMPT, 7]]
        self.front.core.on_add = lambda request: self.added.append(request)
        self.added: list[EngineCoreRequest] = []
        self.load = SHORT
        self.send: Callable[[Guest], Batches] = ends
        self.reports: asyncio.Queue[MoveReport] = asyncio.Queue()
        self.ledger = ledger
        limits = {"worth": 1.0, "rest_s": 0.0, "overhead_s": 0.0, "spare_blocks": 0}
        settings = {
            "limits": SpillLimits(**limits | changes.pop("limits", {})), "interval_s": 60.0,
            "expected_tokens": 64, "prefill_tokens_per_s": 500.0, "first_output_s": 60.0,
            "parked_s": 60.0, "bytes_per_s": 1e9, "folder": folder, **changes,
        }  # fmt: skip
        self.looks = 0
        self.borrower = Borrower(
            core=self.front.moving, load=self._look, ledger=ledger, replica_id="borrower",
            cache_kind="kind",            send=lambda guest: self.send(guest), block_bytes=1000,
            settings=SpillSettings(**settings), tasks=Supervisor(), on_move=self.reports.put_nowait,
        )  # fmt: skip

    def _look(self) -> EngineLoad:
        self.looks += 1
        return self.load

    async def asks(self, **fields: Any) -> None:
        await self.front.asks(**{"prompt_token_ids": PROMPT, "proof": make_proof(), **fields})

    async def moved(self) -> MoveReport:
        return await soon(self.reports.get())

    async def fails_and_is_compressed_again(self) -> None:
        """Let a new request leave for a lender that fails, and be computed where it began."""
        await self.asks()
        await self.borrower.relieve()
        assert (await self.moved()).problem is not None
        await self.over()
        self.front.decodes(self.added[-1].request_id, make_proof())
        await soon(self.front.moving.get_output_async())

    async def over(self) -> None:
        """Wait until every lease has ended."""
        async with asyncio.timeout(60):
            while (await self.ledger.read()).leases or self.borrower.borrowed_blocks:
                pass


async def soon(awaited: Any) -> Any:
    async with asyncio.timeout(60):
        return await awaited


def output(token: int, reason: FinishReason | None = None) -> list[EngineCoreOutput]:
    return [EngineCoreOutput("guest", [token], finish_reason=reason)]


async def ends(guest: Guest) -> Batches:
    yield []
    yield output(8)
    yield output(9, FinishReason.LENGTH)


async def is_gone(guest: Guest) -> Batches:
    raise ConnectionError("the lender is gone")
    yield []


async def refuses(guest: Guest) -> Batches:
    yield []
    raise StateRefused("the state's content differs")


async def never_answers(guest: Guest) -> Batches:
    await asyncio.Event().wait()
    yield []


async def only_arrives(guest: Guest) -> Batches:
    yield []
    await asyncio.Event().wait()


async def waits_for_blocks(guest: Guest) -> Batches:
    yield []
    # Much longer than `first_output_s` of the tests that use it.
    await asyncio.sleep(0.5)
    yield output(8)
    yield output(9, FinishReason.LENGTH)


async def ends_early(guest: Guest) -> Batches:
    yield []
    yield output(8)


async def lend(
    ledger: LendingLedger,
    blocks: int = 100,
    host_bytes: int = 0,
    lender: str = "lender",
    cache_kind: str = "kind",
) -> None:
    await ledger.offer(Offer(lender, blocks, host_bytes, cache_kind), ttl_s=600)
