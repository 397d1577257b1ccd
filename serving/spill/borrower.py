"""Finds other replicas' memory for requests that a replica has too little room for."""

import asyncio
import contextlib
import json
import logging
import sys
import time
import uuid
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import redis

from adakv_serve.router.lending.leases import Lease
from adakv_serve.router.lending.redis_leases import LEASE_TTL_S, LendingLedger
from adakv_serve.router.lending.spill_plan import Candidate, plan_spill
from adakv_serve.serving.http.tracing import note_span
from adakv_serve.serving.spill.lenders import Lenders
from adakv_serve.serving.spill.move import MoveReport, RequestMove, Send, SpillSettings, Stayed
from adakv_serve.serving.spill.parcels import StateFiles
from adakv_serve.serving.supervision import KeptTask, Supervisor

if TYPE_CHECKING:
    from adakv_serve.serving.vllm_engine.load import EngineLoad
    from adakv_worker.frontend.moving import Movable, MovingCore

logger = logging.getLogger("ray.serve")


@dataclass
class _Past:
    """Moves of a request that is here again, and when it came back."""

    moves: int
    settled_at: float


class Borrower:
    """Runs two background tasks for a replica, and one for each of its requests that moves.

    A failure costs only time: the request is computed anew where it began.
    """

    def __init__(
        self,
        *,
        core: "MovingCore",
        load: Callable[[], "EngineLoad"],
        ledger: LendingLedger,
        replica_id: str,
        cache_kind: str,
        send: Send,
        block_bytes: int,
        settings: SpillSettings,
        tasks: Supervisor,
        on_move: Callable[[MoveReport], None] = lambda report: None,
    ) -> None:
        """
        Args:
            cache_kind: name of the kind of caches that lenders must be able to read.
            send: sends a request to its lender, and yields its outputs.
            block_bytes: size of one KV block of all layers.
            tasks: runs its background tasks.
        """
        self._core = core
        self._load = load
        self._ledger = ledger
        self._replica_id = replica_id
        self._cache_kind = cache_kind
        self._send = send
        self._block_bytes = block_bytes
        self._settings = settings
        self._files = StateFiles(settings.folder)
        self._on_move = on_move
        self._leases: dict[str, Lease] = {}
        self._past: dict[str, _Past] = {}
        self._stayed_at: dict[str, float] = {}
        self._lenders = Lenders(settings.bytes_per_s)
        self._tasks = tasks
        # One for each move.
        self._moves: set[asyncio.Task[None]] = set()
        # Moves whose requests have not left the engine yet.
        self._leaving: set[RequestMove] = set()
        self._left_at = float("-inf")
        self._kept: list[KeptTask] = []
        self._store_lost = False
        self._draining = False

    @property
    def borrowed_blocks(self) -> int:
        return sum(lease.amount for lease in self._leases.values() if lease.resource == "blocks")

    def start(self) -> None:
        # Leases have to be renewed whatever becomes of the looks for memory.
        self._kept = [
            self._tasks.keep("borrowing", self._look_often),
            self._tasks.keep("renewal of leases", self._renew_often),
        ]

    def drain(self, draining: bool = True) -> None:
        """Let all compressed requests leave from now on, even where a recompute costs less."""
        self._draining = draining

    async def stop(self) -> None:
        await asyncio.gather(*(kept.stop() for kept in self._kept))
        for move in self._moves:
            move.cancel()
        await asyncio.gather(*self._moves, return_exceptions=True)
        self._files.clear()

    async def _look_often(self) -> None:
        while True:
            await asyncio.sleep(self._settings.interval_s)
            self._forget_rested()
            await self._unless_lost(self.relieve())

    async def _renew_often(self) -> None:
        while True:
            await asyncio.sleep(LEASE_TTL_S / 3)
            if self._leases:
                await self._unless_lost(self.renew())

    async def _unless_lost(self, work: Coroutine[None, None, None]) -> None:
        try:
            await work
            self._store_lost = False
        except (redis.RedisError, OSError) as error:
            if not self._store_lost:
                logger.warning("ledger of lent memory lost, requests stay: %s", error)
            self._store_lost = True

    def _forget_rested(self) -> None:
        rested_at = time.monotonic() - self._settings.limits.rest_s
        self._stayed_at = {name: at for name, at in self._stayed_at.items() if at > rested_at}

    async def relieve(self) -> None:
        """Start moves of as many requests as the replica lacks room for, where moving pays.

        Raises:
            redis.RedisError: the store is lost; nothing has moved.
        """
        load, limits = self._load(), self._settings.limits
        # For waiting requests, and for growth that would cause preemptions.
        needed = (load.waiting_blocks or 0) + load.blocks_reserved_growth - load.blocks_free
        # Each running request may take one more block before the next look.
        pressing = load.running - load.blocks_free
        if self._draining:
            # Nobody is preempted for it: a request goes on here where no lender has blocks.
            needed = load.blocks_total
            limits = replace(limits, worth=0.0, moves_of_a_request=sys.maxsize)
        # The load still counts requests that leave now, or have left since the engine reported it.
        if max(needed, pressing) <= 0 or self._leaving or load.told_at < self._left_at:
            return
        candidates = [
            self._candidate(one, load)
            for one in self._core.movable()
            if not self._has_just_stayed(one.request_id)
        ]
        if not candidates:
            return
        rooms = await self._ledger.best(self._cache_kind)
        moves = plan_spill(
            max(needed, pressing),
            candidates,
            self._lenders.peers(room for room in rooms if room.lender != self._replica_id),
            self._settings.prefill_tokens_per_s,
            limits,
            pressing_blocks=pressing,
        )
        for move in moves:
            lease = Lease(
                uuid.uuid4().hex, move.replica_id, self._replica_id, move.resource, move.amount
            )
            if await self._ledger.take(lease):
                self._start_move(move.request_id, lease)

    def _candidate(self, movable: "Movable", load: "EngineLoad") -> Candidate:
        proof = movable.proof
        decoded = movable.tokens - proof.original_tokens
        left = min(movable.tokens_left, self._settings.expected_tokens)
        past = self._past.get(movable.request_id)
        blocks = proof.held_blocks(decoded)
        return Candidate(
            movable.request_id,
            blocks=blocks,
            peak_blocks=proof.peak_blocks(decoded, left),
            state_bytes=blocks * self._block_bytes,
            tokens=movable.tokens,
            tokens_left=left,
            moves=past.moves if past else 0,
            settled_s=time.monotonic() - past.settled_at if past else float("inf"),
        )

    def _has_just_stayed(self, request_id: str) -> bool:
        """Return whether a request stayed when last asked to leave, as when it was preempted."""
        rest_s = self._settings.limits.rest_s
        return time.monotonic() - self._stayed_at.get(request_id, float("-inf")) < rest_s

    def _start_move(self, request_id: str, lease: Lease) -> None:
        move = RequestMove(
            request_id,
            lease,
            core=self._core,
            send=self._send,
            files=self._files,
            settings=self._settings,
            on_end=lambda: self._past.pop(request_id, None),
        )
        self._leases[lease.lease_id] = lease
        self._leaving.add(move)
        task = self._tasks.once("move of a request", self._run_move(move))
        self._moves.add(task)
        task.add_done_callback(self._moves.discard)

    async def _run_move(self, move: RequestMove) -> None:
        request_id, lender = move.request_id, move.lease.lender

        def on_left() -> None:
            self._leaving.discard(move)
            self._left_at = time.monotonic()

        async def on_arrived(report: MoveReport) -> None:
            self._note(report, move.lease)
            attributes = {f"adakv.{name}": value for name, value in report.log_line().items()}
            note_span("move", move.trace, report.seconds, attributes)
            # The cache has gone from the host's memory to blocks.
            if move.lease.resource == "host_bytes":
                await self._end_lease(move.lease)

        try:
            await move.run(on_left, on_arrived)
        except Stayed:
            pass
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".splitlines()[0]
            logger.warning("request %s does not go on at %s: %s", request_id, lender, problem)
            self._lenders.avoid(lender)
            self._on_move(move.report(problem))
        finally:
            self._leaving.discard(move)
            await self._settle(request_id, move.lease)

    async def _settle(self, request_id: str, lease: Lease) -> None:
        """Take a request back that has not ended elsewhere, and end its lease."""
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
            # A lost store lets it expire soon.
            with contextlib.suppress(redis.RedisError, OSError):
                await self._ledger.give_back(lease.lease_id)

    def _note(self, report: MoveReport, lease: Lease) -> None:
        self._lenders.note(report)
        logger.info("spill moved %s", json.dumps(report.log_line() | {"to": lease.resource}))
        self._on_move(report)

    async def renew(self) -> None:
        """Renew all leases, and take those again that the store has forgotten.

        Raises:
            redis.RedisError: the store is lost.
        """
        for lease_id, lease in list(self._leases.items()):
            # A store that has forgotten the lease must not lend the same memory again.
            if not await self._ledger.renew(lease_id) and lease_id in self._leases:
                await self._ledger.take(lease)
