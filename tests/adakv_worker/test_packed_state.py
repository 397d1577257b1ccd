"""A state that travels arrives as it left, or is refused."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_worker.packed_state import (
    PackedState,
    StateHeader,
    StateRefused,
    hash_tokens,
    pack,
    unpack,
)
from adakv_worker.state import CompressedState

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def header(dtype: str = "float32") -> StateHeader:
    return StateHeader(
        model="some/model", dtype=dtype, page_tokens=32, packing="as it is", layers=5, heads=3,
        head_dim=8, rank=0, ranks=1, policy="ada_snapkv", token_hash=hash_tokens([1, 2, 3]),
    )  # fmt: skip


def state(dtype: str = "float32", most: int = 300) -> CompressedState:
    lens = torch.randint(0, most, (5, 3), dtype=torch.int32)
    pages = torch.randn((2, int((-(-lens // 32)).sum()), 32 * 8)).to(DTYPES[dtype])
    return CompressedState(lens, pages[0], pages[1])


def sent(packed: PackedState) -> PackedState:
    """As through an object store: the arrays come out as views of memory that is read-only."""
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(packed, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(text, buffers=[bytes(buffer) for buffer in buffers])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_arrives_as_it_left(dtype: str) -> None:
    before = state(dtype)
    packed = sent(pack(before, header(dtype)))
    assert not packed.keys.flags.writeable
    for ours, theirs in zip(unpack(packed, header(dtype)), before, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_packing_copies_nothing() -> None:
    before = state()
    packed = pack(before, header())
    assert packed.keys.ctypes.data == before.keys.data_ptr()
    assert packed.nbytes == sum(part.numel() * part.element_size() for part in before)


def test_a_state_of_something_else_is_refused_with_what_differs() -> None:
    packed = pack(state(), header())
    for name, value in header()._asdict().items():
        other = "another" if isinstance(value, str) else value + 1
        with pytest.raises(StateRefused, match=f"the state has {name}"):
            unpack(packed, header()._replace(**{name: other}))


@settings(max_examples=60, deadline=None)
@given(data=st.data(), most=st.sampled_from((3, 40, 2000)))
def test_a_damaged_state_is_refused(data: st.DataObject, most: int) -> None:
    torch.manual_seed(most)
    packed = pack(state(most=most), header())
    name = data.draw(st.sampled_from(("lens", "keys", "values")))
    array = getattr(packed, name).copy()
    content = array.reshape(-1).view(np.uint8)
    if content.size == 0:
        return
    content[data.draw(st.integers(0, content.size - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(StateRefused, match="differs from its checksum"):
        unpack(packed._replace(**{name: array}), header())


@pytest.mark.parametrize("name", ["lens", "keys", "values"])
def test_a_truncated_state_is_refused(name: str) -> None:
    packed = pack(state(), header())
    with pytest.raises(StateRefused, match="differs from its checksum"):
        unpack(packed._replace(**{name: getattr(packed, name)[:-1]}), header())
