"""Held caches between replicas, without engines: what is fetched, handed over, and lost."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from adakv_serve.serving.spill.parcels import open_parcels
from adakv_serve.serving.spill.sessions import (
    Destination,
    MoveSpeed,
    Parcel,
    SessionMove,
    SessionTraffic,
)
from adakv_serve.serving.supervision import Supervisor
from adakv_worker.frontend.session_moves import SessionAsk, SessionCore
from adakv_worker.session_messages import Found, HeldCard

CARD = HeldCard("scope", np.arange(300, dtype=np.int32).tobytes(), 300, 200, 100, 250, 1, True)
ASK = SessionAsk(np.arange(300, dtype=np.int32).tobytes(), None, None)
CONTENT = b"keys and values"


class Core:
    """The held caches of an engine: the names of those here, with what is found of each."""

    def __init__(self, held: list[Found]) -> None:
        self.caches = held
        self.content = CONTENT
        self.answers = True
        self.arrived: list[bytes] = []

    async def find(self, ask: SessionAsk) -> Found | None:
        if not self.answers:
            await asyncio.Event().wait()
        return self.caches[0] if self.caches else None

    async def export_for(
        self, ask: SessionAsk, most_bytes_per_token: float, path: str
    ) -> tuple[Found, HeldCard] | None:
        found = await self.find(ask)
        if found is None or found.nbytes > most_bytes_per_token * found.tokens:
            return None
        card = await self.export(found.name, path)
        return None if card is None else (found, card)

    async def held(self) -> list[Found]:
        return list(self.caches)

    async def export(self, name: str, path: str) -> HeldCard | None:
        if name == "lost":
            return None
        Path(f"{path}.0").write_bytes(self.content)
        return CARD

    async def take_in(self, card: HeldCard, path: str) -> bool:
        self.arrived.append(Path(f"{path}.0").read_bytes())
        return self.arrived[-1] == CONTENT


class Replica:
    """A replica's traffic and the other replicas, by name."""

    def __init__(
        self, folder: Path, held: list[Found], node: str = "node", cache_kind: str = "kind"
    ) -> None:
        self.core, self.node = Core(held), node
        self.now_s, self.folder = 0.0, folder
        self.speed = MoveSpeed(1e6, lambda: self.now_s)
        self.moves: list[SessionMove] = []
        self.replicas: dict[str, Replica] = {}
        self.traffic = SessionTraffic(
            core=cast(SessionCore, self.core),
            peers=self,
            pack=self.pack,
            node_id=node,
            cache_kind=cache_kind,
            folder=folder,
            prefill_tokens_per_s=1000.0,
            speed=self.speed,
            interval_s=0.01,
            tasks=Supervisor(),
            on_move=self.moves.append,
        )

    def pack(self, path: Path) -> list[Any]:
        async def sent(array: np.ndarray) -> np.ndarray:
            return array

        return [sent(array) for array in open_parcels(path)]

    async def give(
        self, holder: str, ask: SessionAsk, most_bytes_per_token: float, to: Destination
    ) -> Parcel | None:
        return await self.replicas[holder].traffic.give(ask, most_bytes_per_token, to)

    async def take(self, receiver: str, one: Found, card: HeldCard, path: Path) -> bool:
        peer = self.replicas[receiver]
        parcel = Parcel(1, 1, card, str(path))
        if peer.node != self.node:
            parcel = parcel._replace(path=None, arrays=self.pack(path))
        return await peer.traffic.take_in(parcel)

    async def others(self) -> list[str]:
        return list(self.replicas)


@pytest.fixture
def node() -> str:
    """The node of the replica that fetches."""
    return "node"


@pytest.fixture
async def pair(tmp_path: Path, node: str) -> AsyncIterator[tuple[Replica, Replica]]:
    here, there = Replica(tmp_path, [], node), Replica(tmp_path, [Found("one", 280, 1000)])
    here.replicas["holder"] = there
    yield here, there
    for replica in (here, there):
        await replica.traffic.stop()
    assert not list(tmp_path.iterdir())


async def fetch(replica: Replica, holder: str = "holder") -> None:
    await replica.traffic.fetch(holder, ASK)


@pytest.mark.parametrize("node", ["node", "another"])
async def test_the_cache_of_a_request_comes_from_its_holder(
    pair: tuple[Replica, Replica], node: str
) -> None:
    here, there = pair
    await fetch(here)
    assert here.core.arrived == [CONTENT]
    (move,) = here.moves
    assert move._replace(seconds=0.0) == SessionMove("fetched", 280, 1000, 0.0, True)
    assert not there.moves


async def test_a_cache_stays_as_it_is_until_its_receiver_has_taken_it_in(
    pair: tuple[Replica, Replica],
) -> None:
    here, there = pair
    taking, taken = asyncio.Event(), asyncio.Event()
    take_in = here.core.take_in

    async def after_a_step(card: HeldCard, path: str) -> bool:
        taking.set()
        await taken.wait()
        return await take_in(card, path)

    here.core.take_in = after_a_step
    first = asyncio.create_task(fetch(here))
    async with asyncio.timeout(30):
        await taking.wait()
    # Meanwhile its holder gives others something.
    there.core.content = b"another's"
    other = Replica(there.folder, [])
    other.replicas["holder"] = there
    await fetch(other)
    taken.set()
    await first
    assert here.core.arrived == [CONTENT]
    await other.traffic.stop()


async def test_a_replica_of_another_version_is_given_nothing(
    pair: tuple[Replica, Replica],
) -> None:
    _, there = pair
    newer = Replica(there.folder, [], cache_kind="of another version")
    newer.replicas["holder"] = there
    await fetch(newer)
    # It would have refused the cache after a copy, which takes the holder's memory and time.
    assert not newer.core.arrived
    assert not newer.moves
    await newer.traffic.stop()


async def test_slow_moves_are_forgotten(pair: tuple[Replica, Replica]) -> None:
    here, there = pair
    there.core.caches = [Found("one", 280, 200_000)]
    here.speed.note(1000, 1.0)
    here.speed.note(1000, 1.0)
    await fetch(here)
    assert not here.moves
    here.now_s += 600.0
    await fetch(here)
    assert [move.is_whole for move in here.moves] == [True]


async def test_nothing_is_fetched_where_that_would_not_pay(pair: tuple[Replica, Replica]) -> None:
    here, there = pair
    # Its own cache saves as much.
    here.core.caches = [Found("own", 280, 1)]
    await fetch(here)
    here.core.caches = []
    # 280 tokens take 0.28 s to compute, and this 0.3 s to move.
    there.core.caches = [Found("large", 280, 300_000)]
    await fetch(here)
    there.core.caches = []
    await fetch(here)
    assert not here.core.arrived
    assert not here.moves


async def test_a_request_goes_on_without_a_cache_that_is_lost(
    pair: tuple[Replica, Replica],
) -> None:
    here, there = pair
    await fetch(here, holder="gone")
    there.core.caches = [Found("lost", 280, 1000)]
    await fetch(here)
    assert not here.moves


async def test_a_damaged_cache_is_counted_as_lost(pair: tuple[Replica, Replica]) -> None:
    here, there = pair
    there.core.content = b"something else"
    await fetch(here)
    assert [move.is_whole for move in here.moves] == [False]


async def test_no_request_waits_longer_than_its_prompt_takes(
    pair: tuple[Replica, Replica],
) -> None:
    here, there = pair
    there.core.answers = False
    async with asyncio.timeout(30):
        await fetch(here)
    assert not here.moves


async def test_a_replica_that_is_to_go_hands_all_over_in_turn(tmp_path: Path) -> None:
    held = [Found(name, 280, 1000) for name in ("new", "lost", "old", "oldest")]
    leaving = Replica(tmp_path, held)
    others = [Replica(tmp_path, []), Replica(tmp_path, [], "another")]
    leaving.replicas = dict(zip("ab", others, strict=True))
    leaving.traffic.drain()
    async with asyncio.timeout(30):
        while len(leaving.moves) < 4:
            await asyncio.sleep(0.01)
        # A request that ended after that has left one more.
        held.insert(0, Found("late", 290, 1000))
        while len(leaving.moves) < 5:
            await asyncio.sleep(0.01)
    await leaving.traffic.stop()
    assert [move.is_whole for move in leaving.moves] == [True, False, True, True, True]
    assert [one.core.arrived for one in others] == [[CONTENT] * 3, [CONTENT]]
    for one in others:
        await one.traffic.stop()
    assert not list(tmp_path.iterdir())


async def test_a_replica_that_stops_hands_over_what_came_last(tmp_path: Path) -> None:
    leaving, other = Replica(tmp_path, []), Replica(tmp_path, [])
    leaving.replicas = {"other": other, "gone": other}
    leaving.traffic.drain()
    leaving.core.caches = [Found("late", 280, 1000)]
    await leaving.traffic.stop()
    assert other.core.arrived == [CONTENT]
    # One that stays hands nothing over.
    staying = Replica(tmp_path, [Found("one", 280, 1000)])
    staying.replicas = {"other": other}
    staying.traffic.drain()
    staying.traffic.drain(False)
    await staying.traffic.stop()
    assert other.core.arrived == [CONTENT]
    await other.traffic.stop()
