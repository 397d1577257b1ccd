"""The figures of KV memory that the scheduler reports after a step."""

import time
from collections.abc import Callable

from adakv_worker.core.counts import Recomputes, WaitingRequests
from adakv_worker.core.manager import AdaKVManager
from adakv_worker.messages import MemoryStats

# Counting takes a millisecond for some ten thousand blocks.
_COUNT_EVICTABLE_EVERY_S = 1.0
# Looks at every running request; a replica reports no more often.
_COUNT_GROWTH_EVERY_S = 0.1


class MemoryFigures:
    """Memory of one engine core. Expensive counts are kept for a while."""

    def __init__(
        self,
        manager: AdaKVManager,
        waiting: WaitingRequests,
        recomputes: Recomputes,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._manager = manager
        self._waiting = waiting
        self._recomputes = recomputes
        self._clock = clock
        self._growth_blocks = self._evictable_blocks = 0
        self._count_growth_at = self._count_evictable_at = float("-inf")

    def read(self, prefilling_tokens: int, *, idle: bool) -> MemoryStats:
        """Return the figures.

        Args:
            prefilling_tokens: prompt tokens of admitted requests that are not computed yet.
            idle: whether nothing runs or waits: then no later step counts again.
        """
        now = self._clock()
        if now >= self._count_evictable_at or idle:
            self._count_evictable_at = now + _COUNT_EVICTABLE_EVERY_S
            self._evictable_blocks = evictable_blocks(self._manager)
        if now >= self._count_growth_at or idle:
            self._count_growth_at = now + _COUNT_GROWTH_EVERY_S
            self._growth_blocks = self._manager.admission.growth_blocks()
        return self._manager.memory_stats()._replace(
            growth_blocks=self._growth_blocks,
            waiting_blocks=self._waiting.blocks,
            queued_prefill_tokens=self._waiting.prefill_tokens + prefilling_tokens,
            evictable_blocks=self._evictable_blocks,
            recomputed_tokens=self._recomputes.tokens,
        )


def evictable_blocks(manager: AdaKVManager) -> int:
    """Return the free blocks with a prefix or a held cache. Looks at all blocks of the pool."""
    held = manager.held.blocks if manager.held is not None else 0
    blocks = manager.block_pool.blocks
    return held + sum(block.ref_cnt == 0 and block.block_hash is not None for block in blocks)
