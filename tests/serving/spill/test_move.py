"""What becomes of a request that leaves, also when its move fails, without an engine."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adakv_serve.router.lending.redis_leases import LendingLedger
from adakv_serve.serving.spill.parcels import Guest
from adakv_worker.messages import continuation_in
from tests.serving.spill.borrowing import (
    PRESSING,
    PROMPT,
    Batches,
    Borrowing,
    ends_early,
    is_gone,
    lend,
    never_answers,
    only_arrives,
    output,
    refuses,
    soon,
    waits_for_blocks,
)


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
