"""A held cache: what an ended or preempted request leaves for the next turn."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from adakv_worker.core.floor import Floor

TokenIds = npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The cache of an ended or preempted request.

    name: its name for the workers.
    scope: what a request must share with it beside the tokens: see `Scope`.
    token_ids: the tokens that its entries are of.
    entry_tokens: tokens that the workers have entries for; one more than `token_ids` where a step
        was under way when the request ended.
    floor: from there on, each head has an entry for every token.
    compressed_at: tokens at its last compression; the entries of later ones compete in the next.
    turn: compressions of prompts so far.
    block_hashes: vLLM's hashes of the full blocks that its tokens would fill.
    parked_blocks: blocks that it takes when it comes back from the host's memory; 0 in the pool.
    """

    name: str
    scope: Hashable
    token_ids: TokenIds
    entry_tokens: int
    floor: Floor
    compressed_at: int
    blocks: tuple[KVCacheBlock, ...]
    turn: int
    block_hashes: tuple[BlockHash, ...] = ()
    parked_blocks: int = 0

    @property
    def size_blocks(self) -> int:
        """Blocks that a request takes with it."""
        return len(self.blocks) or self.parked_blocks

    @property
    def source(self) -> str:
        """Where it is, for the proof of a request that begins with it."""
        return "host" if self.parked_blocks else "pool"

    def matching(self, token_ids: TokenIds) -> int:
        """Return how many tokens it saves of a request; 0 where it does not fit.

        At least the request's last token is computed anew, for the first token of its answer.
        """
        most = min(len(self.token_ids), len(token_ids) - 1)
        if most < self.floor.tokens:
            return 0
        different = np.flatnonzero(self.token_ids[:most] != token_ids[:most])
        common = int(different[0]) if len(different) else most
        return common if common >= max(self.floor.tokens, 1) else 0


class ToHold(NamedTuple):
    """What the scheduler knows of a request whose cache may be held: see `Held`."""

    scope: Hashable
    token_ids: TokenIds
    entry_tokens: int
    block_hashes: Sequence[BlockHash] = ()


class Match(NamedTuple):
    """A held cache, and the tokens that it saves of a request."""

    held: Held
    tokens: int
