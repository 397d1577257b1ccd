"""A block pool with held caches and a clock, for the tests."""

import numpy as np
from vllm.v1.core.block_pool import BlockPool

from adakv_worker.core.floor import Floor
from adakv_worker.core.held import Held, TokenIds
from adakv_worker.core.held_caches import HeldCaches

BLOCKS, MOST_BLOCKS, MOST, IDLE_S, PATIENCE_S = 41, 20, 4, 100.0, 0.5


def tokens(*ids: int) -> TokenIds:
    return np.array(ids, dtype=np.int32)


class Pool:
    """A pool of blocks, its held caches and a clock."""

    def __init__(
        self, reach_blocks: int = 4, host_blocks: int = 0, arrived_blocks: int = 0
    ) -> None:
        self.now_s = 0.0
        self.pool = BlockPool(BLOCKS, enable_caching=True, hash_block_size=4)
        self.held = HeldCaches(
            self.pool,
            MOST_BLOCKS,
            MOST,
            IDLE_S,
            reach_blocks,
            PATIENCE_S,
            host_blocks,
            arrived_blocks,
            lambda: self.now_s,
        )

    def arrive(
        self,
        ids: TokenIds,
        blocks: int,
        floor: int = 0,
        has_session: bool = False,
        age_s: float = 0.0,
    ) -> Held:
        held = Held(
            self.held.next_name(), "a", ids, len(ids), Floor(floor, 0), floor, (), turn=1,
            parked_blocks=blocks, has_arrived=True, has_session=has_session,
        )  # fmt: skip
        self.held.arrive(held, age_s)
        return held

    def hold(
        self,
        ids: TokenIds,
        blocks: int,
        floor: int = 0,
        scope: str = "a",
        has_session: bool = False,
    ) -> Held:
        held = Held(
            self.held.next_name(), scope, ids, len(ids), Floor(floor, 0), floor,
            tuple(self.pool.get_new_blocks(blocks)), turn=1, has_session=has_session,
        )  # fmt: skip
        self.held.hold(held)
        return held
