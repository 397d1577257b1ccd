"""A packed state unpacks to equal tensors, or is refused."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_worker.worker.packed_state import (
    CompressedState,
    PackedState,
    StateHeader,
    StateRefused,
    hash_tokens,
    pack,
    unpack,
)
from adakv_worker.worker.windows import Window

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def header(dtype: str = "float32") -> StateHeader:
    return StateHeader(
        model="some/model", fingerprint="0a", dtype=dtype, query_dtype=dtype, page_tokens=32,
        packing="as it is",
        layers=5, heads=3, head_dim=8, entry_size=8, rank=0, ranks=1, policy="ada_snapkv",
        token_hash=hash_tokens([1, 2, 3]),
    )  # fmt: skip


def state(dtype: str = "float32", most: int = 300, *, has_window: bool = True) -> CompressedState:
    """Return a random state of 5 layers, with 3 KV heads for 6 query heads."""
    lens = torch.randint(0, most, (5, 3), dtype=torch.int32)
    pages = torch.randn((2, int((-(-lens // 32)).sum()), 32 * 8)).to(DTYPES[dtype])
    window = Window(90, 4, torch.randn((5, 4, 6, 8)).to(DTYPES[dtype])) if has_window else None
    return CompressedState(lens, pages[0], pages[1], window)


def tensors(state: CompressedState) -> list[torch.Tensor]:
    window = [state.window.queries] if state.window is not None else []
    return [state.lens, state.keys, state.values, *window]


def sent(packed: PackedState) -> PackedState:
    """Return the state as from an object store: its arrays are views of read-only memory."""
    buffers: list[pickle.PickleBuffer] = []
    text = pickle.dumps(packed, protocol=5, buffer_callback=buffers.append)
    return pickle.loads(text, buffers=[bytes(buffer) for buffer in buffers])


@pytest.mark.parametrize("has_window", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_state_arrives_as_it_left(dtype: str, has_window: bool) -> None:
    before = state(dtype, has_window=has_window)
    packed = sent(pack(before, header(dtype)))
    assert not packed.keys.flags.writeable
    arrived = unpack(packed, header(dtype))
    if before.window is not None:
        assert arrived.window is not None
        assert arrived.window[:2] == before.window[:2]
    for ours, theirs in zip(tensors(arrived), tensors(before), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


def test_packing_copies_nothing() -> None:
    before = state()
    packed = pack(before, header())
    assert packed.keys.ctypes.data == before.keys.data_ptr()
    assert packed.nbytes == sum(part.numel() * part.element_size() for part in tensors(before))


def test_a_state_with_another_header_is_refused_by_the_field_that_differs() -> None:
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
    name = data.draw(st.sampled_from(("lens", "keys", "values", "queries")))
    array = getattr(packed, name).copy()
    content = array.reshape(-1).view(np.uint8)
    if content.size == 0:
        return
    content[data.draw(st.integers(0, content.size - 1))] ^= data.draw(st.integers(1, 255))
    with pytest.raises(StateRefused, match="differs from its checksum"):
        unpack(packed._replace(**{name: array}), header())


@pytest.mark.parametrize("name", ["lens", "keys", "values", "queries"])
def test_a_truncated_state_is_refused(name: str) -> None:
    packed = pack(state(), header())
    with pytest.raises(StateRefused, match="differs from its checksum"):
        unpack(packed._replace(**{name: getattr(packed, name)[:-1]}), header())


@given(st.integers(0, 40), st.integers(0, 1 << 30))
@settings(max_examples=50, deadline=None)
def test_a_state_loses_the_last_entries_of_each_head(tokens: int, seed: int) -> None:
    torch.manual_seed(seed)
    lens = torch.randint(tokens, 100, (5, 3), dtype=torch.int32)
    pages = -(-lens.reshape(-1).long() // 32)
    # A page's number is 100 times its head's, plus its place in the head.
    names = torch.cat([torch.arange(count) + 100 * head for head, count in enumerate(pages)])
    keys = names[:, None].expand(-1, 32 * 8).float()
    shorter = CompressedState(lens, keys, -keys).without_last(tokens, 32)
    left = -(-shorter.lens.reshape(-1).long() // 32)
    assert torch.equal(shorter.lens, lens - tokens)
    expected = torch.cat([torch.arange(count) + 100 * head for head, count in enumerate(left)])
    assert torch.equal(shorter.keys[:, 0], expected.float())
    assert torch.equal(shorter.values, -shorter.keys)
