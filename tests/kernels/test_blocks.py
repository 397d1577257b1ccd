"""Block arithmetic: tokens and entries to blocks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.kernels.blocks import (
    DecodeBound,
    KeepLimit,
    blocks_for_tokens,
    compressed_blocks_bound,
    kept_tokens,
    prefix_hash,
)


@given(st.integers(0, 1 << 40), st.integers(1, 4096))
def test_blocks_hold_all_tokens_and_no_block_is_empty(num_tokens: int, block_size: int) -> None:
    blocks = blocks_for_tokens(num_tokens, block_size)
    assert blocks * block_size >= num_tokens
    assert (blocks - 1) * block_size < num_tokens or blocks == 0


@pytest.mark.parametrize(("num_tokens", "block_size"), [(-1, 32), (1, 0), (1, -32)])
def test_arguments_out_of_range_are_refused(num_tokens: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=r"num_tokens|block_size_tokens"):
        blocks_for_tokens(num_tokens, block_size)


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=30),
    st.integers(0, 200),
    st.sampled_from([1, 16, 32]),
)
def test_the_block_bound_holds_for_any_split_and_wastes_one_block_at_most(
    lens: list[int], decoded: int, page: int
) -> None:
    # The mean is whole, as policies conserve it.
    lens[0] += -sum(lens) % len(lens)
    bound = compressed_blocks_bound(sum(lens) // len(lens), decoded, page)
    needed_pages = sum(blocks_for_tokens(length + decoded, page) for length in lens)
    needed_blocks = blocks_for_tokens(needed_pages, len(lens))
    assert needed_blocks <= bound <= needed_blocks + 1


@given(st.integers(1, 400), st.sampled_from([1, 3, 16]))
def test_some_split_needs_the_block_bound(kept: int, page: int) -> None:
    heads = page * (page + 1)
    # As many heads as possible have one entry in their last page; the last head has the rest.
    pages, _ = divmod(kept - 1, page)
    lens = [pages * page + 1] * heads
    spare = kept * heads - sum(lens)
    for head in range(heads):
        lens[head] += page * min(1, spare // page)
        spare -= page * min(1, spare // page)
    lens[-1] += spare
    assert sum(lens) == kept * heads
    needed_pages = sum(blocks_for_tokens(length, page) for length in lens)
    assert blocks_for_tokens(needed_pages, heads) == compressed_blocks_bound(kept, 0, page)


@given(st.integers(0, 4000), st.integers(0, 4000), st.floats(0, 1))
def test_kept_tokens_never_exceed_the_prompt(n: int, budget: int, ratio: float) -> None:
    kept = kept_tokens(n, budget, ratio)
    assert min(n, budget) <= kept <= n
    assert kept >= ratio * n


@pytest.mark.parametrize(
    ("bound", "limit", "kept"),
    [
        (None, None, 51),
        (None, KeepLimit(40, 0.1), 40),
        (None, KeepLimit(20, 0.3), 31),
        (None, KeepLimit(80, 0.9), 51),
        (DecodeBound(16, 8), None, 16),
        (DecodeBound(90, 8), KeepLimit(40, 0.1), 40),
    ],
)
def test_kept_tokens_respect_the_limit_and_the_decode_bound(
    bound: DecodeBound | None, limit: KeepLimit | None, kept: int
) -> None:
    assert kept_tokens(101, 30, 0.5, bound, limit) == kept


def test_a_prefix_hash_depends_on_all_tokens_before() -> None:
    first, other = prefix_hash(0, [1, 2]), prefix_hash(0, [2, 2])
    assert len({first, other, prefix_hash(first, [3, 4]), prefix_hash(other, [3, 4])}) == 4
    assert prefix_hash(first, [3, 4]) == prefix_hash(prefix_hash(0, (1, 2)), (3, 4))
