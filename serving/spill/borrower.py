"""Finds other replicas' blocks for requests that a replica has too little room for."""

import asyncio
import contextlib
import json
import logging
import sys
import time
import uuid
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import redis

from router.lending.leases import Lease
from router.lending.redis_leases import LEASE_TTL_S, LendingLedger
from router.lending.spill_plan import Candidate, Move, Peer, SpillLimits, plan_spill
from serving.spill.parcels import Guest, StateFiles

if TYPE_CHECKING:
    from adakv_worker.frontend.moving import Decoded, Movable, MovingCore
    from serving.vllm_engine.load import EngineLoad

logger = logging.getLogger("ray.serve")

# How much a new measurement of a lender's speed counts.
_NEWEST = 0.3

Send = Callable[[Guest], "AsyncGenerator[Decoded, None]"]


class SpillSettings(NamedTuple):
    """
    expected_tokens: most that an answer is expected to bring still.
    first_output_s: within which a lender must have gone on with a request, or hold its cache.
    parked_s: how long a cache may wait for a lender's blocks.
    bytes_per_s: assumed of a lender until a move has been measured.
    """

    limits: SpillLimits
    interval_s: float
    expected_tokens: int
    prefill_tokens_per_s: float
    first_output_s: float
    parked_s: float
    bytes_per_s: float
    folder: Path


class MoveReport(NamedTuple):
    """One move that came to its first output, or why it did not.

    Since it was chosen: export_s until its cache was out of the engine, arrival_s until it was
    there, seconds in all.
    """

    request_id: str
    lender: str
    state_bytes: int
    export_s: float
    arrival_s: float
    seconds: float
    problem: str | None

    @property
    def bytes_per_s(self) -> float:
        """From engine to engine. Both finish their steps first, which costs nobody anything."""
        return self.state_bytes / max(self.arrival_s - self.export_s, 1e-3)

    def log_line(self) -> dict[str, Any]:
        return {
            "request_id": self.request_id,
            "lender": self.lender,
            "bytes": self.state_bytes,
            "export_ms": round(self.export_s * 1000, 2),
            "arrival_ms": round(self.arrival_s * 1000, 2),
            "first_output_ms": round(self.seconds * 1000, 2),
        }


class _Stays(Exception):
    """A request that was asked to leave does not."""


class _Facts:
    """What is known of one move so far."""

    def __init__(self, request_id: str, lender: str) -> None:
        self.request_id = request_id
        self._lender = lender
        self._began = time.monotonic()
        self._export_s = 0.0
        self._arrival_s = 0.0
        self._state_bytes = 0

    def exported(self, state_bytes: int) -> None:
        self._export_s, self._state_bytes = time.monotonic() - self._began, state_bytes

    def arrived(self) -> None:
        self._arrival_s = time.monotonic() - self._began

    def report(self, problem: str | None) -> MoveReport:
        return MoveReport(
            self.request_id,
            self._lender,
            self._state_bytes,
            self._export_s,
            self._arrival_s,
            time.monotonic() - self._began,
            problem,
        )


@dataclass
class _Past:
    moves: int
    settled_at: float


class Borrower:
    """One background task for a replica, and one for each of its requests that are away.

    Whatever fails costs time alone: the request is then computed anew where it began.
    """

    def __init__(
        self,
        *,
        core: "MovingCore",
        load: Callable[[], "EngineLoad"],
        ledger: LendingLedger,
        replica_id: str,
        send: Send,
        block_bytes: int,
        settings: SpillSettings,
        on_move: Callable[[MoveReport], None] = lambda report: None,
    ) -> None:
        """
        Args:
            send: takes a request to its lender, and yields what is decoded of it there.
            block_bytes: of one KV block, all layers.
        """
        self._core = core
        self._load = load
        self._ledger = ledger
        self._replica_id = replica_id
        self._send = send
        self._block_bytes = block_bytes
        self._settings = settings
        self._files = StateFiles(settings.folder)
        self._on_move = on_move
        self._leases: dict[str, Lease] = {}
        self._past: dict[str, _Past] = {}
        self._stayed_at: dict[str, float] = {}
        self._bytes_per_s: dict[str, float] = {}
        # One for each lease.
        self._tasks: set[asyncio.Task[None]] = set()
        # Leases whose requests are on their way.
        self._leaving: set[str] = set()
        self._left_at = float("-inf")
        self._task: asyncio.Task[None] | None = None
        self._renewed_at = time.monotonic()
        self._store_lost = False
        self._draining = False

    @property
    def borrowed_blocks(self) -> int:
        return sum(lease.amount for lease in self._leases.values() if lease.resource == "blocks")

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run())

    def drain(self, draining: bool = True) -> None:
        """From now on every compressed request shall leave, whatever a recompute would cost."""
        self._draining = draining

    async def stop(self) -> None:
        tasks = [task for task in (self._task, *self._tasks) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._files.clear()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._settings.interval_s)
            try:
                await self._renew()
                await self.relieve()
                self._store_lost = False
            except (redis.RedisError, OSError) as error:
                if not self._store_lost:
                    logger.warning("ledger of lent memory lost, requests stay: %s", error)
                self._store_lost = True
            except Exception:
                logger.exception("cannot look for lent memory")

    async def relieve(self) -> None:
        """Has as many requests leave as are in the way of what waits, where that is worth it.

        Raises:
            redis.RedisError: the store is lost; nothing has moved.
        """
        load, limits = self._load(), self._settings.limits
        # What waits, and the growth that would else preempt.
        needed = (load.waiting_blocks or 0) + load.blocks_reserved_growth - load.blocks_free
        # Every running request may want one more block before the next look.
        pressing = load.running - load.blocks_free
        if self._draining:
            needed, pressing = load.blocks_total, load.blocks_total
            limits = replace(limits, worth=0.0, moves_of_a_request=sys.maxsize)
        # What has left since the engine told of its blocks, or is about to, is not counted there.
        if max(needed, pressing) <= 0 or self._leaving or load.told_at < self._left_at:
            return
        candidates = [
            self._candidate(one, load)
            for one in self._core.movable()
            if not self._has_just_stayed(one.request_id)
        ]
        if not candidates:
            return
        settings = self._settings
        moves = plan_spill(
            max(needed, pressing),
            candidates,
            await self._peers(),
            settings.prefill_tokens_per_s,
            limits,
            pressing_blocks=pressing,
        )
        for move in moves:
            lease = Lease(
                uuid.uuid4().hex, move.replica_id, self._replica_id, move.resource, move.amount
            )
            if await self._ledger.take(lease):
                self._leases[lease.lease_id] = lease
                task = asyncio.get_running_loop().create_task(self._move(move, lease))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _peers(self) -> list[Peer]:
        lending = await self._ledger.read()
        return [
            Peer(
                lender,
                blocks,
                lending.room("host_bytes")[lender],
                self._bytes_per_s.get(lender, self._settings.bytes_per_s),
            )
            for lender, blocks in lending.room().items()
            if lender != self._replica_id
        ]

    def _candidate(self, movable: "Movable", load: "EngineLoad") -> Candidate:
        proof, size = movable.proof, load.block_size_tokens
        decoded = movable.tokens - proof.original_tokens
        left = min(movable.tokens_left, self._settings.expected_tokens)
        past = self._past.get(movable.request_id)
        blocks = proof.held_blocks(decoded, size)
        return Candidate(
            movable.request_id,
            blocks=blocks,
            peak_blocks=proof.peak_blocks(decoded, left, size),
            state_bytes=blocks * self._block_bytes,
            tokens=movable.tokens,
            tokens_left=left,
            moves=past.moves if past else 0,
            settled_s=time.monotonic() - past.settled_at if past else float("inf"),
        )

    def _has_just_stayed(self, request_id: str) -> bool:
        """Whether it was asked to leave and did not: one that is preempted holds no cache."""
        rest_s = self._settings.limits.rest_s
        return time.monotonic() - self._stayed_at.get(request_id, float("-inf")) < rest_s

    async def _move(self, move: Move, lease: Lease) -> None:
        request_id, facts = move.request_id, _Facts(move.request_id, lease.lender)
        self._leaving.add(lease.lease_id)
        try:
            async with contextlib.AsyncExitStack() as stack:
                files = stack.enter_context(contextlib.ExitStack())
                path = files.enter_context(self._files.path())
                guest = await self._leave(request_id, lease, path)
                self._check_away(request_id)
                self._leaving.discard(lease.lease_id)
                self._left_at = time.monotonic()
                facts.exported(guest.nbytes)
                outputs = await stack.enter_async_context(contextlib.aclosing(self._send(guest)))
                del guest
                first = await self._first_output(outputs, lease, facts)
                self._check_away(request_id)
                # It is in the lender's engine now.
                files.close()
                self._note_move(facts.report(None), lease)
                if lease.resource == "host_bytes":
                    await self._end_lease(lease)
                await self._follow(request_id, first, outputs)
        except _Stays:
            pass
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("request %s does not go on at %s: %s", request_id, lease.lender, problem)
            self._on_move(facts.report(problem))
        finally:
            await self._settle(request_id, lease)

    async def _leave(self, request_id: str, lease: Lease, path: Path) -> Guest:
        """Raises _Stays: it has ended, or has no cache now."""
        departure = await self._core.leave(request_id, str(path))
        if departure is None:
            raise _Stays
        task = asyncio.current_task()
        assert task is not None
        self._core.on_end(request_id, lambda: self._ended(request_id, task))
        return Guest(departure, str(path), lease)

    async def _settle(self, request_id: str, lease: Lease) -> None:
        """However a move went: a request that has not ended goes on here, and the lease is over."""
        self._leaving.discard(lease.lease_id)
        try:
            if self._core.is_away(request_id):
                past = self._past.get(request_id)
                self._past[request_id] = _Past(past.moves + 1 if past else 1, time.monotonic())
                await self._core.come_back(request_id)
            else:
                self._stayed_at[request_id] = time.monotonic()
        finally:
            await self._end_lease(lease)

    async def _end_lease(self, lease: Lease) -> None:
        if self._leases.pop(lease.lease_id, None) is not None:
            # Else it ends by itself, soon.
            with contextlib.suppress(redis.RedisError, OSError):
                await self._ledger.give_back(lease.lease_id)

    def _ended(self, request_id: str, task: asyncio.Task[Any]) -> None:
        self._past.pop(request_id, None)
        # Unless it ends itself, by what it has just delivered.
        if task is not asyncio.current_task():
            task.cancel()

    def _check_away(self, request_id: str) -> None:
        """Raises _Stays: it has ended, or its client has left, while nobody could be told."""
        if not self._core.is_away(request_id):
            raise _Stays

    async def _first_output(
        self, outputs: "AsyncGenerator[Decoded, None]", lease: Lease, facts: _Facts
    ) -> "Decoded":
        """Waits until a lender has gone on with a request.

        Raises:
            TimeoutError: it has not in time.
        """
        settings = self._settings
        async with asyncio.timeout(settings.first_output_s) as patience:
            # What comes first is nothing but the news that its cache has arrived.
            await anext(outputs)
            facts.arrived()
            if lease.resource == "host_bytes":
                patience.reschedule(asyncio.get_running_loop().time() + settings.parked_s)
            return await anext(outputs)

    async def _follow(
        self, request_id: str, first: "Decoded", outputs: "AsyncGenerator[Decoded, None]"
    ) -> None:
        """Hands on what is decoded elsewhere, until the request's end."""
        batch = first
        while self._core.deliver(request_id, batch):
            batch = await anext(outputs, [])
            if not batch:
                raise ConnectionError("the lender has let go of it")

    def _note_move(self, report: MoveReport, lease: Lease) -> None:
        before = self._bytes_per_s.get(report.lender, self._settings.bytes_per_s)
        newest = report.bytes_per_s
        self._bytes_per_s[report.lender] = before + _NEWEST * (newest - before)
        logger.info("spill moved %s", json.dumps(report.log_line() | {"to": lease.resource}))
        self._on_move(report)

    async def _renew(self) -> None:
        now = time.monotonic()
        if now - self._renewed_at < LEASE_TTL_S / 3:
            return
        self._renewed_at = now
        rest_s = self._settings.limits.rest_s
        self._stayed_at = {name: at for name, at in self._stayed_at.items() if now - at < rest_s}
        for lease_id, lease in list(self._leases.items()):
            # Where the store has forgotten it, others must not be lent the same.
            if not await self._ledger.renew(lease_id) and lease_id in self._leases:
                await self._ledger.take(lease)
