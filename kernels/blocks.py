"""Block arithmetic in plain Python: how tokens and entries become blocks."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# First entries, which draw much attention whatever their text (StreamingLLM, 2309.17453):
# evictions while decoding keep them.
SINK_TOKENS = 4


def blocks_for_tokens(num_tokens: int, block_size_tokens: int) -> int:
    """Return the number of blocks that hold `num_tokens` uncompressed tokens.

    Raises:
        ValueError: `num_tokens` is negative or `block_size_tokens` is not positive.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens={num_tokens} is negative")
    if block_size_tokens <= 0:
        raise ValueError(f"block_size_tokens={block_size_tokens} must be positive")
    return -(-num_tokens // block_size_tokens)


def compressed_blocks_bound(kept: int, decoded: int, page_tokens: int) -> int:
    """Return a bound on the blocks of a compressed request after `decoded` more tokens.

    A page holds `page_tokens` entries of one head of one layer; a block has one page for each head
    of each layer. For `kept` entries per head on average, partly filled pages waste less
    than one page per head, so the bound exceeds the need by at most one block. It holds for every
    split over layers and heads: the scheduler can compute it before the worker selects.
    """
    return blocks_for_tokens(kept + decoded + page_tokens - 1, page_tokens)


class DecodeBound(NamedTuple):
    """Limit on a compressed cache while its request decodes.

    A cache that reaches `budget_tokens + interval_tokens` entries per head on average is cut down
    to `budget_tokens`. Each token adds one entry per head, so the size follows from two counts:
    `kept`, the entries right after compression (at most the budget), and `decoded`, the tokens
    since.
    """

    budget_tokens: int
    interval_tokens: int

    @property
    def most_tokens(self) -> int:
        """Return the entries per head that the cache never exceeds."""
        return self.budget_tokens + self.interval_tokens

    def entries(self, kept: int, decoded: int) -> int:
        """Return the entries after the last decoded token, before that step evicts any."""
        grown = kept + decoded
        if grown <= self.most_tokens:
            return grown
        return self.budget_tokens + 1 + (grown - self.most_tokens - 1) % self.interval_tokens

    def evicts(self, kept: int, decoded: int) -> bool:
        """Return whether the step of the last decoded token ends with an eviction."""
        return self.entries(kept, decoded) == self.most_tokens

    def until_next(self, kept: int, decoded: int) -> int:
        """Return the number of further tokens until a step evicts again."""
        entries = self.entries(kept, decoded)
        return self.interval_tokens if entries == self.most_tokens else self.most_tokens - entries


class KeepLimit(NamedTuple):
    """Most that a request may keep: the larger of `tokens` and a share of its prompt."""

    tokens: int
    keep_ratio: float


def kept_tokens(
    num_tokens: int,
    budget_tokens: int,
    keep_ratio: float = 0.0,
    bound: DecodeBound | None = None,
    limit: KeepLimit | None = None,
) -> int:
    """Return the entries per head, on average, that a request keeps of `num_tokens`.

    This is the larger of the budget and the share of the prompt, at most the prompt, the limit and
    the budget of evictions while decoding.
    """
    kept = min(num_tokens, max(budget_tokens, math.ceil(keep_ratio * num_tokens)))
    if limit is not None:
        kept = min(kept, max(limit.tokens, math.ceil(limit.keep_ratio * num_tokens)))
    return kept if bound is None else min(kept, bound.budget_tokens)


def entries_after(kept: int, decoded: int, bound: DecodeBound | None) -> int:
    """Return the entries per head of a compressed cache after `decoded` more tokens."""
    return kept + decoded if bound is None else bound.entries(kept, decoded)


def most_entries(entries: int, more: int, bound: DecodeBound | None) -> int:
    """Return the most entries per head that a cache of `entries` reaches within `more` tokens."""
    return entries + more if bound is None else min(entries + more, bound.most_tokens)


def prefix_hash(parent: int, token_ids: Sequence[int]) -> int:
    """Return a hash of a full block's tokens and, through `parent`, of all tokens before them.

    All processes of one Python version compute the same hash.

    Args:
        parent: hash of the preceding block; 0 for the first block.
    """
    return hash((parent, *token_ids))
