"""Block arithmetic in plain Python: the one place where tokens become blocks."""


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
