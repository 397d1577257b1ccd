"""Block arithmetic in plain Python: the one place where tokens become blocks."""

import math
from collections.abc import Sequence
from typing import NamedTuple

# First entries, which draw much attention whatever their text (StreamingLLM, 2309.17453):
# evictions while decoding keep them.
SINK_TOKENS = 4


def blocks_for_tokens(num_tokens: int, block_size_tokens: int) -> int:
    """Number of KV blocks that hold `num_tokens` uncompressed tokens.

    Args:
        num_tokens: cached tokens, >= 0.
        block_size_tokens: tokens per block, > 0.

    Raises:
        ValueError: if an argument is out of range.
    """
    if num_tokens < 0:
        raise ValueError(f"num_tokens={num_tokens} is negative")
    if block_size_tokens <= 0:
        raise ValueError(f"block_size_tokens={block_size_tokens} must be positive")
    return -(-num_tokens // block_size_tokens)


def compressed_blocks_bound(kept: int, decoded: int, block_size_tokens: int) -> int:
    """Blocks that surely hold a compressed request after `decoded` more tokens.

    A page holds `block_size_tokens` entries of one head of one layer, and a block is one page for
    each of them. With `kept` entries per (layer, head) on average, however they are split, partly
    filled pages waste less than a page for each head, so this bound is at most one block above
    the need. It depends on no split: the scheduler needs no word from the worker.
    """
    return blocks_for_tokens(kept + decoded + block_size_tokens - 1, block_size_tokens)


class DecodeBound(NamedTuple):
    """How far a compressed cache may grow while its request decodes.

    Whenever it has come to `budget_tokens + interval_tokens` entries per (layer, KV head) on
    average, it is cut down to `budget_tokens`. One entry comes with each token, so that everything
    follows from counts: `kept` is what it began with, at most the budget, `decoded` the tokens
    since.
    """

    budget_tokens: int
    interval_tokens: int

    @property
    def most_tokens(self) -> int:
        """Entries that it never exceeds."""
        return self.budget_tokens + self.interval_tokens

    def entries(self, kept: int, decoded: int) -> int:
        """Entries in the step that adds the last of the decoded tokens, before it evicts any."""
        grown = kept + decoded
        if grown <= self.most_tokens:
            return grown
        return self.budget_tokens + 1 + (grown - self.most_tokens - 1) % self.interval_tokens

    def evicts(self, kept: int, decoded: int) -> bool:
        """Whether that step ends with an eviction."""
        return self.entries(kept, decoded) == self.most_tokens

    def until_next(self, kept: int, decoded: int) -> int:
        """Further tokens until the next step that evicts."""
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
    """Return the mean entries per (layer, KV head) that a request keeps of `num_tokens`.

    The larger of the fixed budget and the share of the prompt, never more than the prompt, the
    limit, or what evictions while decoding would leave of it.
    """
    kept = min(num_tokens, max(budget_tokens, math.ceil(keep_ratio * num_tokens)))
    if limit is not None:
        kept = min(kept, max(limit.tokens, math.ceil(limit.keep_ratio * num_tokens)))
    return kept if bound is None else min(kept, bound.budget_tokens)


def entries_after(kept: int, decoded: int, bound: DecodeBound | None) -> int:
    """Entries per (layer, KV head) of a compressed cache after `decoded` more tokens."""
    return kept + decoded if bound is None else bound.entries(kept, decoded)


def most_entries(entries: int, more: int, bound: DecodeBound | None) -> int:
    """Most that a compressed cache of so many entries holds within `more` tokens."""
    return entries + more if bound is None else min(entries + more, bound.most_tokens)


def prefix_hash(parent: int, token_ids: Sequence[int]) -> int:
    """Names a full block by its tokens and, through its parent's name, by all before them.

    The same in all processes of one Python version.

    Args:
        parent: the name of the block before, 0 for none.
    """
    return hash((parent, *token_ids))
