"""When requests leave for a lender, and when they stay, without an engine."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from adakv_serve.router.lending.redis_leases import LendingLedger
from adakv_serve.serving.spill.parcels import Guest
from tests.adakv_worker.proofs import make_proof
from tests.serving.spill.borrowing import (
    SHORT,
    Batches,
    Borrowing,
    is_gone,
    lend,
    only_arrives,
    refuses,
)
from tests.serving.spill.spill_pair import KEYS, LOAD


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


async def test_a_replica_that_is_removed_sends_no_request_to_wait_elsewhere(
    ledger: LendingLedger, tmp_path: Path
) -> None:
    await lend(ledger, blocks=0, host_bytes=1 << 30)
    borrowing = Borrowing(ledger, tmp_path)
    borrowing.load = LOAD
    await borrowing.asks()
    borrowing.borrower.drain()
    await borrowing.borrower.relieve()
    assert not (await ledger.read()).leases


@pytest.mark.parametrize("fails", [refuses, is_gone], ids=["of another version", "gone"])
async def test_a_lender_that_has_failed_is_not_asked_again_at_once(
    ledger: LendingLedger, tmp_path: Path, fails: Callable[[Guest], Batches]
) -> None:
    borrowing = Borrowing(ledger, tmp_path)
    borrowing.send = fails
    borrowing.borrower.drain()
    await borrowing.fails_and_is_compressed_again()
    await borrowing.borrower.relieve()
    assert not (await ledger.read()).leases
    await lend(ledger, lender="another")
    await borrowing.borrower.relieve()
    assert [lease.lender for lease in (await ledger.read()).leases] == ["another"]
    await borrowing.borrower.stop()


async def test_a_request_stays_where_lenders_cannot_read_its_cache(
    ledger: LendingLedger, tmp_path: Path
) -> None:
    borrowing = Borrowing(ledger, tmp_path)
    await borrowing.asks()
    await lend(ledger, cache_kind="of another version")
    borrowing.borrower.drain()
    await borrowing.borrower.relieve()
    assert not (await ledger.read()).leases
    await lend(ledger, lender="another")
    await borrowing.borrower.relieve()
    assert (await borrowing.moved()).lender == "another"
    await borrowing.borrower.stop()


async def test_only_one_replica_gets_the_last_blocks(ledger: LendingLedger, tmp_path: Path) -> None:
    proof = make_proof()
    peak = proof.peak_blocks(1, 8)
    await lend(ledger, blocks=peak)
    borrowings = [Borrowing(ledger, tmp_path) for _ in range(2)]
    for borrowing in borrowings:
        borrowing.send = only_arrives
        await borrowing.asks()
    await asyncio.gather(*(borrowing.borrower.relieve() for borrowing in borrowings))
    assert [one.amount for one in (await ledger.read()).leases] == [peak]
    assert sum(borrowing.borrower.borrowed_blocks for borrowing in borrowings) == peak
    await asyncio.gather(*(borrowing.borrower.stop() for borrowing in borrowings))


async def test_a_request_moves_as_often_as_it_may(ledger: LendingLedger, tmp_path: Path) -> None:
    borrowing = Borrowing(ledger, tmp_path, limits={"moves_of_a_request": 1})
    borrowing.send = is_gone
    await borrowing.fails_and_is_compressed_again()
    assert len(borrowing.front.moving.movable()) == 1
    await lend(ledger, lender="another")
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
    await lend(ledger, lender="another")
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
