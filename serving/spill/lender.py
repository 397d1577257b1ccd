"""Offers a replica's spare memory, and decodes the requests of the borrowers that lease it."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import redis

from adakv_serve.router.lending.leases import Lease, Offer
from adakv_serve.router.lending.redis_leases import OFFER_TTL_S, LendingLedger
from adakv_serve.serving.spill.parcels import Guest, StateFiles, place_parcels
from adakv_serve.serving.supervision import KeptTask, Supervisor
from adakv_worker.messages import Proof

if TYPE_CHECKING:
    from adakv_serve.serving.vllm_engine.load import EngineLoad
    from adakv_worker.frontend.moving import Decoded, MovingCore

# Longest wait of a cache from another node for its request.
_ARRIVED_S = 30.0


@dataclass
class _Held:
    """A guest's lease and proof.

    decoded: tokens since its proof; None until its cache is in the engine.
    """

    lease: Lease
    proof: Proof
    decoded: int | None = None

    @property
    def leased_blocks(self) -> int:
        return self.lease.amount if self.lease.resource == "blocks" else 0

    @property
    def growth_blocks(self) -> int:
        """Return the blocks that it has leased and does not hold yet."""
        if self.decoded is None:
            return self.leased_blocks
        return max(0, self.leased_blocks - self.proof.held_blocks(self.decoded))


class Lender:
    """Runs one background task that offers memory, and takes in guests."""

    def __init__(
        self,
        *,
        core: "MovingCore",
        load: Callable[[], "EngineLoad"],
        ledger: LendingLedger,
        replica_id: str,
        cache_kind: str,
        share: float,
        folder: Path,
        park_bytes: int,
        max_requests: int,
        silent: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        Args:
            cache_kind: name of the kind of caches that the engine can read.
            share: offered part of the blocks that no request here will need.
            max_requests: number of requests from which on nothing more is offered.
            folder: folder in memory for caches from other nodes.
            park_bytes: host memory for caches that wait for blocks.
            silent: whether the engine does not answer, so that nothing is offered.
        """
        self._core = core
        self._load = load
        self._ledger = ledger
        self._replica_id = replica_id
        self._cache_kind = cache_kind
        self._share = share
        self._files = StateFiles(folder)
        self._park_bytes = park_bytes
        self._max_requests = max_requests
        self._silent = silent
        self._guests: dict[str, _Held] = {}
        self._arrived: dict[str, contextlib.ExitStack] = {}
        self._task: KeptTask | None = None

    @property
    def lent_blocks(self) -> int:
        return sum(guest.leased_blocks for guest in self._guests.values())

    def start(self, tasks: Supervisor) -> None:
        """Begin to offer, unless that has begun."""
        if self._task is None:
            self._task = tasks.keep("offers of memory", self._run)

    async def stop(self) -> None:
        """Withdraw the offer. Guests stay until their end."""
        if self._task is not None:
            # Else an offer on its way could arrive after the withdrawal.
            await self._task.stop()
            self._task = None
        for lease_id in list(self._arrived):
            self._forget(lease_id)
        self._files.clear()
        with contextlib.suppress(redis.RedisError, OSError):
            await self._ledger.withdraw(self._replica_id)

    async def place(self, lease: Lease, parcels: Sequence[Any]) -> str:
        """Write a cache from another node to files in memory, and return their path.

        Separate from `take_in`, because Ray's object stores keep arguments for as long as the call
        takes.

        Args:
            parcels: awaitables of uint8 arrays, one for each tensor-parallel rank.

        Raises:
            LookupError: the lease is of another replica.
            OSError: there is no room for the cache.
        """
        self._check_own(lease)
        with contextlib.ExitStack() as stack:
            path = stack.enter_context(self._files.path())
            arrays = [await parcel for parcel in parcels]
            await asyncio.to_thread(place_parcels, arrays, path)
            self._arrived[lease.lease_id] = stack.pop_all()
        asyncio.get_running_loop().call_later(_ARRIVED_S, self._forget, lease.lease_id)
        return str(path)

    def _check_own(self, lease: Lease) -> None:
        if lease.lender != self._replica_id:
            raise LookupError(f"the lease is of {lease.lender}, and this is {self._replica_id}")

    def _forget(self, lease_id: str) -> None:
        """Free the files of a cache whose request has not come."""
        if files := self._arrived.pop(lease_id, None):
            files.close()

    async def take_in(self, guest: Guest) -> "AsyncGenerator[Decoded, None]":
        """Yield a guest's outputs until its end. Closing the generator ends the guest.

        The first batch is empty: the cache has arrived. A guest that has leased host memory waits
        with the engine's other requests until the engine has blocks for it.

        Raises:
            LookupError: the lease is of another replica.
            StateRefused: the cache is damaged or not the guest's.
        """
        departure, path, lease = guest
        self._check_own(lease)
        proof = departure.proof
        held = self._guests[lease.lease_id] = _Held(lease, proof)
        decoded = len(departure.tokens) - proof.original_tokens
        try:
            with self._arrived.pop(lease.lease_id, contextlib.nullcontext()):
                outputs = self._core.take_in(departure, path)
                yield []
                first = await anext(outputs)
            async with contextlib.aclosing(outputs):
                held.decoded = decoded
                yield first
                async for batch in outputs:
                    held.decoded += sum(len(output.new_token_ids) for output in batch)
                    yield batch
        finally:
            del self._guests[lease.lease_id]

    async def _run(self) -> None:
        while True:
            # The next offer follows soon, and borrowers log a lost store.
            with contextlib.suppress(redis.RedisError, OSError):
                await self._ledger.offer(self.offer())
            await asyncio.sleep(OFFER_TTL_S / 5)

    def offer(self) -> Offer:
        """Return the present offer: lent blocks, and a share of those that can be spared."""
        load = self._load()
        if self._silent() or load.running + load.waiting >= self._max_requests:
            return Offer(self._replica_id, self.lent_blocks, 0, self._cache_kind)
        leased = sum(guest.growth_blocks for guest in self._guests.values())
        # The engine's own figure includes growth of guests, too, so the larger one counts.
        growth = max(leased, load.blocks_reserved_growth)
        spare = load.blocks_free - growth - (load.waiting_blocks or 0)
        blocks = self.lent_blocks + max(0, int(self._share * spare))
        return Offer(self._replica_id, blocks, self._park_bytes, self._cache_kind)
