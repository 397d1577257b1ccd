"""Held caches on their way from replica to replica.

One goes with a request that is sent to another replica than the one that holds its cache, and all
of them leave a replica that is to go. A failure costs only time: the request computes its prompt.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import redis

from adakv_serve.serving.http.tracing import span
from adakv_serve.serving.spill.parcels import StateFiles, place_parcels
from adakv_serve.serving.supervision import KeptTask, Supervisor

if TYPE_CHECKING:
    from adakv_worker.frontend.session_moves import SessionAsk, SessionCore
    from adakv_worker.session_messages import Found, HeldCard

logger = logging.getLogger("ray.serve")

# Weight of a new measurement of the speed, and the half-life of what was measured: while moves seem
# slow none is made, so only time can correct the estimate.
_NEWEST = 0.3
_HALF_LIFE_S = 60.0
# Time of an engine's step with a long prefill.
_STEP_S = 1.0
# Longest time that a replica takes to hand over one cache; when it stops, what it still holds.
_LAST_S = 10.0


class Parcel(NamedTuple):
    """A held cache for another replica.

    tokens: those of the request that it saves, or of all its entries. nbytes: its size.
    path: path of its files on the receiver's node, good until the receiver has answered; None if it
        comes from another node.
    arrays: then awaitables of uint8 arrays, one for each tensor-parallel rank.
    """

    tokens: int
    nbytes: int
    card: "HeldCard"
    path: str | None
    arrays: Sequence[Any] = ()


class Destination(NamedTuple):
    """Where the receiver wants the files of a cache: a path of its own, and its node.

    cache_kind: name of the kind of caches that it can read.
    """

    node_id: str
    path: str
    cache_kind: str


class SessionMove(NamedTuple):
    """A held cache that has come to a replica, or gone from one. is_whole: whether all went well.

    way: `fetched` for a request, or `handed_over` by a replica that is to go.
    """

    way: str
    tokens: int
    nbytes: int
    seconds: float
    is_whole: bool


class Peers(Protocol):
    """The other replicas, by id."""

    async def give(
        self, holder: str, ask: "SessionAsk", most_bytes_per_token: float, to: Destination
    ) -> Parcel | None:
        """Call the holder's `SessionTraffic.give`."""
        ...

    async def take(self, receiver: str, one: "Found", card: "HeldCard", path: Path) -> bool:
        """Send a cache in files of this node to the receiver's `SessionTraffic.take_in`."""
        ...

    async def others(self) -> list[str]:
        """Return the replicas that get requests, those with the most room first."""
        ...


class MoveSpeed:
    """Estimate of the speed of moves: measurements, which fade into the assumed speed."""

    def __init__(
        self, assumed_bytes_per_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._assumed = assumed_bytes_per_s
        self._clock = clock
        self._difference = 0.0
        self._measured_at_s = clock()

    @property
    def bytes_per_s(self) -> float:
        age_s = self._clock() - self._measured_at_s
        return float(self._assumed + self._difference * 0.5 ** (age_s / _HALF_LIFE_S))

    def note(self, nbytes: int, seconds: float) -> None:
        """Take a move into account."""
        speed, before = nbytes / max(seconds, 1e-6), self.bytes_per_s
        self._difference = before + _NEWEST * (speed - before) - self._assumed
        self._measured_at_s = self._clock()


class SessionTraffic:
    """Fetches, gives, takes in and hands over the held caches of one replica."""

    def __init__(
        self,
        *,
        core: "SessionCore",
        peers: Peers,
        pack: Callable[[Path], Sequence[Any]],
        node_id: str,
        cache_kind: str,
        folder: Path,
        prefill_tokens_per_s: float,
        speed: MoveSpeed,
        interval_s: float,
        tasks: Supervisor,
        on_move: Callable[[SessionMove], None] = lambda move: None,
    ) -> None:
        """
        Args:
            pack: returns the arrays of a cache's files, for another node.
            node_id: this replica's node.
            cache_kind: name of the kind of caches that the engine can read.
            prefill_tokens_per_s: speed at which a prompt would be computed instead.
            speed: the speed at which caches come.
            interval_s: time between two looks for caches to hand over.
            tasks: runs the background task that hands over.
        """
        self._core = core
        self._peers = peers
        self._pack = pack
        self._node_id = node_id
        self._cache_kind = cache_kind
        self._files = StateFiles(folder)
        self._prefill_tokens_per_s = prefill_tokens_per_s
        self._speed = speed
        self._interval_s = interval_s
        self._on_move = on_move
        # Those that have been handed over, by name.
        self._handed_over: set[str] = set()
        self._tasks = tasks
        self._draining: KeptTask | None = None

    async def fetch(self, holder: str, ask: "SessionAsk") -> None:
        """Fetch the held cache of a request that is about to begin here, if that pays.

        The request waits about as long as its prompt would take to be computed, at most.
        """
        try:
            # A call waits for the end of a step, for which the request would wait as well.
            with span("fetch session", **{"adakv.holder": holder, "adakv.tokens": ask.tokens}):
                async with asyncio.timeout(_STEP_S + ask.tokens / self._prefill_tokens_per_s):
                    await self._fetch(holder, ask)
        except Exception as error:
            logger.info("a session of replica %s is computed anew: %r", holder, error)

    async def _fetch(self, holder: str, ask: "SessionAsk") -> None:
        most = self._speed.bytes_per_s / self._prefill_tokens_per_s
        # The receiver owns the files, because it knows when it has read them.
        with self._files.path() as path:
            to = Destination(self._node_id, str(path), self._cache_kind)
            parcel, own = await asyncio.gather(
                self._peers.give(holder, ask, most, to), self._core.find(ask)
            )
            if parcel is None:
                return
            saved = parcel.tokens - (own.tokens if own is not None else 0)
            if saved <= 0:
                return
            began = time.monotonic()
            is_whole = await self.take_in(parcel)
            seconds = time.monotonic() - began
        if is_whole:
            self._speed.note(parcel.nbytes, seconds)
        self._on_move(SessionMove("fetched", saved, parcel.nbytes, seconds, is_whole))

    async def give(
        self, ask: "SessionAsk", most_bytes_per_token: float, to: Destination
    ) -> Parcel | None:
        """Return the held cache that saves most of another replica's request; None without one.

        Args:
            most_bytes_per_token: larger caches would take longer to move than to compute.
            to: where the other replica waits for it. On another node it takes arrays instead. It
                gets nothing if it cannot read this replica's caches, as in a rolling update.
        """
        if to.cache_kind != self._cache_kind:
            return None
        if to.node_id == self._node_id:
            exported = await self._core.export_for(ask, most_bytes_per_token, to.path)
            return None if exported is None else _parcel(*exported, to.path)
        with self._files.path() as path:
            exported = await self._core.export_for(ask, most_bytes_per_token, str(path))
            if exported is None:
                return None
            return _parcel(*exported, None, await asyncio.to_thread(self._pack, path))

    async def take_in(self, parcel: Parcel) -> bool:
        """Hold a cache from another replica; return whether it is whole."""
        if parcel.path is not None:
            return await self._core.take_in(parcel.card, parcel.path)
        with self._files.path() as path:
            arrays = [await array for array in parcel.arrays]
            await asyncio.to_thread(place_parcels, arrays, path)
            return await self._core.take_in(parcel.card, str(path))

    def drain(self, draining: bool = True) -> None:
        """Hand over what is held now, and what requests still leave, to the other replicas."""
        if self._draining is not None:
            self._draining.cancel()
        self._draining = self._tasks.keep("handing over", self._hand_over_all) if draining else None
        self._handed_over.clear()

    async def stop(self) -> None:
        """Hand over the rest if the replica is to go, for a short time."""
        if self._draining is not None:
            await self._draining.stop()
            with contextlib.suppress(TimeoutError, Exception):
                async with asyncio.timeout(_LAST_S):
                    await self.hand_over()
        self._files.clear()

    async def _hand_over_all(self) -> None:
        while True:
            try:
                await self.hand_over()
            except (redis.RedisError, OSError) as error:
                # The store or the engine is lost, and others report that.
                logger.info("sessions stay: %r", error)
            await asyncio.sleep(self._interval_s)

    async def hand_over(self) -> None:
        """Send copies of the held caches that have not been handed over to the other replicas.

        Raises:
            redis.RedisError: the store is lost.
            ConnectionError: the engine core has ended.
        """
        held = [one for one in await self._core.held() if one.name not in self._handed_over]
        others = await self._peers.others() if held else []
        if not others:
            return
        for number, one in enumerate(held):
            self._handed_over.add(one.name)
            began = time.monotonic()
            is_whole = await self._send(one, others[number % len(others)])
            seconds = time.monotonic() - began
            self._on_move(SessionMove("handed_over", one.tokens, one.nbytes, seconds, is_whole))

    async def _send(self, one: "Found", receiver: str) -> bool:
        try:
            async with asyncio.timeout(_LAST_S):
                with self._files.path() as path:
                    card = await self._core.export(one.name, str(path))
                    return card is not None and await self._peers.take(receiver, one, card, path)
        except Exception as error:
            logger.info("a session is lost: %s did not take it: %r", receiver, error)
            return False


def _parcel(
    found: "Found", card: "HeldCard", path: str | None, arrays: Sequence[Any] = ()
) -> Parcel:
    return Parcel(found.tokens, found.nbytes, card, path, arrays)
