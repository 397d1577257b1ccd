"""A held cache: what an ended or preempted request leaves for the next turn."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock

from adakv_worker.core.floor import Floor
from adakv_worker.session_messages import HeldCard, TokenIds, common_tokens


@dataclass(frozen=True, slots=True, eq=False)
class Held:
    """The cache of an ended or preempted request.

    name: its name for the workers.
    scope: what a request must share with it beside the tokens: see `scope_of`.
    token_ids: the tokens that its entries are of.
    entry_tokens: tokens that the workers have entries for; one more than `token_ids` where a step
        was under way when the request ended.
    floor: from there on, each head has an entry for every token.
    compressed_at: tokens at its last compression; the entries of later ones compete in the next.
    turn: compressions of prompts so far.
    block_hashes: vLLM's hashes of the full blocks that its tokens would fill.
    parked_blocks: blocks that its content would fill; 0 while it is in the pool.
    has_arrived: whether it came from another replica, and no request has begun with it here.
    has_session: whether its client names its session, and so will probably ask on.
    cache_salt: the salt of its requests.
    has_adapter: whether a LoRA adapter has computed it. Engines number these by themselves.
    """

    name: str
    scope: str
    token_ids: TokenIds
    entry_tokens: int
    floor: Floor
    compressed_at: int
    blocks: tuple[KVCacheBlock, ...]
    turn: int
    block_hashes: tuple[BlockHash, ...] = ()
    parked_blocks: int = 0
    has_arrived: bool = False
    has_session: bool = False
    cache_salt: str | None = None
    has_adapter: bool = False

    @property
    def size_blocks(self) -> int:
        """Blocks that its content fills."""
        return len(self.blocks) or self.parked_blocks

    @property
    def source(self) -> str:
        """Where it is, for the proof of a request that begins with it."""
        if self.has_arrived:
            return "replica"
        return "host" if self.parked_blocks else "pool"

    def matching(self, token_ids: TokenIds) -> int:
        """Return how many tokens it saves of a request: see `common_tokens`."""
        return common_tokens(self.token_ids, self.floor.tokens, token_ids)

    def card(self, held_at_s: float) -> HeldCard:
        """Return what other processes may know of it.

        Args:
            held_at_s: see `HeldCard`.
        """
        tokens, entries = self.floor
        return HeldCard(
            self.scope, self.token_ids.tobytes(), self.entry_tokens, tokens, entries,
            self.compressed_at, self.turn, bool(self.block_hashes), self.has_session,
            self.cache_salt, self.has_adapter, held_at_s,
        )  # fmt: skip


class ToHold(NamedTuple):
    """What the scheduler knows of a request whose cache may be held: see `Held`."""

    scope: str
    token_ids: TokenIds
    entry_tokens: int
    block_hashes: Sequence[BlockHash] = ()
    has_session: bool = False
    cache_salt: str | None = None
    has_adapter: bool = False


class Match(NamedTuple):
    """A held cache, and the tokens that it saves of a request."""

    held: Held
    tokens: int


def least_valuable(among: Iterable[Held], value: Callable[[Held], float], newest: Held) -> Held:
    """Return the cache that goes first, the older one of two equals; the newest one goes last."""
    return min((held for held in among if held is not newest), key=value, default=newest)
