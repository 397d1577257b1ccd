"""Held caches: what ended and preempted requests leave for the next turn.

The blocks of a held cache are free: they lie in the pool's queue, from which vLLM takes the oldest
first, so that held caches cause no preemption. A cache whose first block is taken is lost, or goes
to the host's memory.
"""

import itertools
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Literal

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from adakv_worker.core.free_blocks import next_blocks, to_the_front
from adakv_worker.core.held import Held, Match, least_valuable
from adakv_worker.core.held_index import HeldIndex
from adakv_worker.core.host_tier import HostTier
from adakv_worker.session_messages import TokenIds

# Why a held cache is gone. reused: vLLM gave its blocks to a request. cap: the caches exceeded a
# limit. idle: no request resumed it in time. forgotten: a reset dropped all caches.
Reason = Literal["reused", "cap", "idle", "forgotten"]


class HeldCaches:
    """The held caches of an engine core, the one that was used least recently first.

    The first one is also the first to go, except that caches of named sessions count as used a
    minute later.

    At most `most_blocks` blocks are held, by at most `most` caches, for at most `idle_s` seconds.
    Caches that lose their blocks to others go to the host's memory, if they fit there.

    patient: whether requests that begin without a cache leave the youngest ones alone.
    """

    def __init__(
        self,
        pool: BlockPool,
        most_blocks: int,
        most: int,
        idle_s: float,
        reach_blocks: int,
        patience_s: float = 0.0,
        host_blocks: int = 0,
        arrived_blocks: int = 0,
        clock: Callable[[], float] = time.monotonic,
        publish: Callable[[Held, bool], None] = lambda held, is_there: None,
    ) -> None:
        """
        Args:
            reach_blocks: blocks that one step may allocate.
            host_blocks: blocks whose content fits the host's memory.
            arrived_blocks: the same for caches from other replicas, besides.
            publish: called when a cache is held, and when it is not held any more.
        """
        self._publish = publish
        self._patience_s = patience_s
        self.patient = True
        self._pool = pool
        self._reach_blocks = reach_blocks
        self._most_blocks = most_blocks
        self._most = most
        self._index = HeldIndex(idle_s, clock)
        self._held: OrderedDict[str, Held] = OrderedDict()
        self._host = HostTier(host_blocks, self._index.value)
        self._arrived = HostTier(arrived_blocks, self._index.value)
        self._owners: dict[int, str] = {}
        self._expected: dict[str, Held] = {}
        self._names = map(str, itertools.count())
        self._lost: list[Held] = []
        self.blocks = 0
        # Since the engine's start.
        self.dropped: dict[str, int] = {"reused": 0, "cap": 0, "idle": 0, "forgotten": 0}
        # What the workers are to do with the next step.
        self._gone: list[str] = []
        self._parks: list[str] = []

    def __len__(self) -> int:
        return len(self._index)

    def __contains__(self, name: str) -> bool:
        return name in self._index

    def get(self, name: str) -> Held:
        return self._held[name] if name in self._held else self._tier_of(name).get(name)

    def __iter__(self) -> Iterator[Held]:
        yield from self._held.values()
        yield from self._host
        yield from self._arrived

    def _tier_of(self, name: str) -> HostTier:
        """Return the part of the host's memory with a cache that is not in the pool."""
        return self._host if name in self._host else self._arrived

    def find(self, scope: str, token_ids: TokenIds) -> Match | None:
        """Return the held cache that saves most tokens of a request, or None."""
        return self._index.find(scope, token_ids)

    def young_blocks(self) -> int:
        """Return the blocks of caches that are younger than `patience_s`; 0 while not patient."""
        if not self.patient:
            return 0
        young = itertools.takewhile(
            lambda held: self._index.age_s(held) < self._patience_s, reversed(self._held.values())
        )
        return sum(len(held.blocks) for held in young)

    def next_name(self) -> str:
        return next(self._names)

    def expect(self, request_id: str, held: Held) -> None:
        """Note the cache of a request whose blocks will be received next.

        Args:
            held: without blocks; or as it was before, if the workers have not begun the request.
        """
        self._expected[request_id] = held

    def receive(self, request_id: str, blocks: list[KVCacheBlock]) -> list[KVCacheBlock]:
        """Hold the blocks of an expected cache; return the others, which the caller frees."""
        held = self._expected.pop(request_id, None)
        if held is None:
            return blocks
        if held.parked_blocks:
            self._index.add(held)
            self._put_on_host(held)
            self._publish(held, True)
            return blocks
        count = len(held.blocks) or len(blocks)
        self.hold(replace(held, blocks=tuple(blocks[:count])))
        return blocks[count:]

    def hold(self, held: Held) -> None:
        """Hold a cache, whose blocks the caller owns; the least recently used go to make room."""
        self._held[held.name] = held
        self._index.add(held)
        self._owners |= {block.block_id: held.name for block in held.blocks}
        self.blocks += len(held.blocks)
        self._pool.unpin_blocks(held.blocks, self._taken)
        self._publish(held, True)
        if len(held.blocks) > self._most_blocks:
            # Others need not go for one that cannot stay.
            self._lose(held, "cap")
            return
        while self.blocks > self._most_blocks or len(self._held) > self._most:
            self._lose(least_valuable(self._held.values(), self._index.value, held), "cap")

    def arrive(self, held: Held, age_s: float = 0.0) -> None:
        """Hold a cache from another replica, which the workers have in the host's memory.

        Args:
            age_s: for how long it has been held there.
        """
        if not self._arrived.fits(held):
            self._gone.append(held.name)
            self.dropped["cap"] += 1
            return
        self._index.add(held, age_s)
        self._put_on_host(held)
        self._publish(held, True)

    def refresh(self, name: str) -> None:
        """Count a held cache as used now: a request waits for it."""
        self._index.refresh(name)
        if name in self._held:
            self._held.move_to_end(name)
            self._to_the_end(self._held[name])
        else:
            self._tier_of(name).refresh(name)

    def take(self, name: str) -> Held:
        """Return a held cache, which ends; its blocks belong to the caller.

        One from the host's memory has none.
        """
        held = self.get(name)
        if name in self._held:
            self._leave_pool(held)
            self._pool.touch(held.blocks)
        else:
            self._tier_of(name).take(name)
        self._remove(held)
        return held

    def lend(self, name: str) -> Held:
        """Return a held cache for a copy; it stays held, unless others overwrite it."""
        self.refresh(name)
        self._index.lend(name)
        return self.get(name)

    def next_step(self) -> None:
        """Forget idle caches, and keep those that are held out of the allocator's reach."""
        self._index.next_step()
        for tier in (self._held.values(), self._host):
            for held in itertools.takewhile(self._index.is_idle, list(tier)):
                self._drop(held, "idle")
        # Arrived caches are not sorted by age.
        for held in list(filter(self._index.is_idle, self._arrived)):
            self._drop(held, "idle")
        self._free_lost()
        self._move_back()

    def forget(self) -> None:
        """Drop all held caches."""
        forgotten = {held.name: held for held in self}
        for held in forgotten.values():
            self._drop(held, "forgotten")
        # Their content may be gone before the workers could copy it.
        self._parks = [name for name in self._parks if name not in forgotten]
        self._free_lost()

    @property
    def has_gone(self) -> bool:
        """Whether caches were dropped of which the workers do not know yet."""
        return bool(self._gone)

    def take_gone(self) -> list[str]:
        """Return the caches that were dropped since the last call, by name."""
        gone, self._gone = self._gone, []
        return gone

    def take_parks(self) -> list[str]:
        """Return the caches that moved to the host's memory since the last call, by name."""
        parks, self._parks = self._parks, []
        return parks

    def check(self) -> None:
        """Assert that all held blocks are free and held once, and that nothing exceeds its cap."""
        assert len(self._held) <= self._most, "too many caches are held"
        assert self.blocks <= self._most_blocks, "too many blocks are held"
        assert self.blocks == sum(len(held.blocks) for held in self), "held blocks are miscounted"
        self._host.check()
        self._arrived.check()
        owners = {block.block_id: held.name for held in self for block in held.blocks}
        assert len(owners) == self.blocks, "a block is held twice"
        assert owners == self._owners
        for held in self:
            assert held.floor.tokens <= len(held.token_ids) <= held.entry_tokens
            for block in held.blocks:
                assert block.ref_cnt == 0, f"block {block.block_id} is held and used"
                assert block.block_hash is None, "a held block can be found as a prefix"
        assert not self._expected, "a cache was expected and not held"
        self._index.check(self)

    def _taken(self, block: KVCacheBlock) -> None:
        """Lose the cache of a block that vLLM gives to a request, if a cache still has it."""
        name = self._owners.get(block.block_id)
        if name is not None:
            self._lose(self._held[name], "reused")

    def _lose(self, held: Held, reason: Reason) -> None:
        """Move a cache out of the pool: to the host's memory if it fits there, else drop it."""
        if not self._host.fits(held):
            self._drop(held, reason)
            return
        self._leave_pool(held)
        self._lost.append(held)
        # The workers copy it before the step in which its blocks are written.
        self._parks.append(held.name)
        parked = replace(held, blocks=(), parked_blocks=len(held.blocks))
        self._index.replace(parked)
        self._put_on_host(parked)

    def _put_on_host(self, held: Held) -> None:
        tier = self._arrived if held.has_arrived else self._host
        for out in tier.put(held):
            self._end(out, "cap")

    def _drop(self, held: Held, reason: Reason) -> None:
        if held.name in self._held:
            self._leave_pool(held)
            # Others of its blocks may be handed out by the same call.
            self._lost.append(held)
        else:
            self._tier_of(held.name).take(held.name)
        self._end(held, reason)

    def _end(self, held: Held, reason: Reason) -> None:
        self._remove(held)
        self._gone.append(held.name)
        self.dropped[reason] += 1

    def _remove(self, held: Held) -> None:
        self._index.remove(held)
        self._publish(held, False)

    def _leave_pool(self, held: Held) -> None:
        del self._held[held.name]
        for block in held.blocks:
            del self._owners[block.block_id]
        self.blocks -= len(held.blocks)

    def _free_lost(self) -> None:
        """Move the blocks of lost caches to the front of the queue: vLLM takes them next."""
        lost, self._lost = self._lost, []
        for held in lost:
            free = [
                block for block in held.blocks
                if block.ref_cnt == 0 and block.block_hash is None
                and block.block_id not in self._owners
            ]  # fmt: skip
            to_the_front(self._pool, free)

    def _move_back(self) -> None:
        """Move held caches that the next allocations would take behind the blocks of prefixes.

        A held block saves more tokens than one of a prefix: it holds a compressed cache. Where
        there are too few others, the least valuable held caches stay in front.
        """
        if not self._held:
            return
        others = self._pool.get_num_free_blocks() - self.blocks
        to_go = self._least_valuable(self._reach_blocks - others)
        blocks = next_blocks(self._pool, self._reach_blocks)
        owners = [self._owners.get(block.block_id) for block in blocks]
        for name in dict.fromkeys(owners):
            if name is not None and name not in to_go:
                self._to_the_end(self._held[name])

    def _least_valuable(self, blocks: int) -> set[str]:
        """Return the least valuable caches with at least so many blocks in all, by name."""
        names: set[str] = set()
        if blocks <= 0:
            return names
        for held in sorted(self._held.values(), key=self._index.value):
            names.add(held.name)
            blocks -= len(held.blocks)
            if blocks <= 0:
                break
        return names

    def _to_the_end(self, held: Held) -> None:
        """Have the pool take other free blocks first."""
        self._pool.touch(held.blocks)
        self._pool.unpin_blocks(held.blocks, self._taken)
