"""Block arithmetic in plain Python: the one place where tokens become blocks."""

import math
from collections.abc import Sequence


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


def kept_tokens(num_tokens: int, budget_tokens: int, keep_ratio: float = 0.0) -> int:
    """Mean entries per (layer, KV head) that a request keeps of `num_tokens`.

    The larger of the fixed budget and the share of the prompt, never more than the prompt.
    """
    return min(num_tokens, max(budget_tokens, math.ceil(keep_ratio * num_tokens)))


def compressed_blocks_bound(kept: int, decoded: int, block_size_tokens: int) -> int:
    """Blocks that surely hold a compressed request after `decoded` more tokens.

    A page holds `block_size_tokens` entries of one head of one layer, and a block is one page for
    each of them. With `kept` entries per (layer, head) on average, however they are split, partly
    filled pages waste less than a page for each head, so this bound is at most one block above
    the need. It depends on no split: the scheduler needs no word from the worker.
    """
    return blocks_for_tokens(kept + decoded + block_size_tokens - 1, block_size_tokens)


def prefix_hash(parent: int, token_ids: Sequence[int]) -> int:
    """Names a full block by its tokens and, through its parent's name, by all before them.

    The same in all processes of one Python version.

    Args:
        parent: the name of the block before, 0 for none.
    """
    return hash((parent, *token_ids))
