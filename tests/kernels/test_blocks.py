import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels.blocks import blocks_for_tokens


@given(st.integers(0, 1 << 40), st.integers(1, 4096))
def test_blocks_hold_all_tokens_and_no_block_is_empty(num_tokens: int, block_size: int) -> None:
    blocks = blocks_for_tokens(num_tokens, block_size)
    assert blocks * block_size >= num_tokens
    assert (blocks - 1) * block_size < num_tokens or blocks == 0


@pytest.mark.parametrize(("num_tokens", "block_size"), [(-1, 32), (1, 0), (1, -32)])
def test_senseless_arguments_are_refused(num_tokens: int, block_size: int) -> None:
    with pytest.raises(ValueError, match=r"num_tokens|block_size_tokens"):
        blocks_for_tokens(num_tokens, block_size)
