"""Every fast path against its reference, on random input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.attention import mean_window_attention
from kernels.growth import grow_tables
from kernels.paged_cache import PagedCache, compact
from kernels.top import top_mask

PAGE = 4


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 4),
    group=st.integers(1, 4),
    window=st.integers(1, 8),
    older=st.integers(0, 40),
    seed=st.integers(0, 10**6),
)
def test_mean_window_attention(heads: int, group: int, window: int, older: int, seed: int) -> None:
    generator = _generator(seed)
    queries = torch.randn((heads, group, window, 8), generator=generator)
    keys = torch.randn((heads, window + older, 8), generator=generator)
    fast = mean_window_attention(queries, keys, 0.3)
    torch.testing.assert_close(fast, mean_window_attention.reference(queries, keys, 0.3))


@settings(max_examples=100, deadline=None)
@given(rows=st.integers(1, 3), m=st.integers(1, 40), seed=st.integers(0, 10**6), data=st.data())
def test_top_mask_of_many_rows(rows: int, m: int, seed: int, data: st.DataObject) -> None:
    scores = torch.randint(0, 5, (rows, m), generator=_generator(seed)).float()
    count = data.draw(st.integers(0, m))
    assert torch.equal(top_mask(scores, count), top_mask.reference(scores, count))


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 3),
    requests=st.integers(1, 3),
    heads=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 9),
)
def test_grow_tables(layers: int, requests: int, heads: int, seed: int, steps: int) -> None:
    generator = _generator(seed)
    lens = torch.randint(1, 12, (layers, requests, heads), generator=generator, dtype=torch.int32)
    width = 12 // PAGE + steps // PAGE + 2
    tables = torch.randint(
        0, 99, (layers, requests, heads, width), generator=generator, dtype=torch.int32
    )
    room = layers * heads * width
    pages = torch.randperm(requests * room, generator=generator).view(requests, room) + 100
    used = torch.randint(0, 3, (requests,), generator=generator)
    granted = torch.full((requests,), room)
    state = (lens, tables, used)
    reference = tuple(tensor.clone() for tensor in state)
    for _ in range(steps):
        fast = grow_tables(lens, tables, pages, used, granted, PAGE)
        slow = grow_tables.reference(*reference[:2], pages, reference[2], granted, PAGE)
        assert all(torch.equal(a, b) for a, b in zip(fast, slow, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(state, reference, strict=True))


@pytest.mark.parametrize("grow", [grow_tables, grow_tables.reference], ids=["fast", "reference"])
def test_without_a_page_nothing_grows(grow) -> None:  # type: ignore[no-untyped-def]
    lens = torch.tensor([[[PAGE, 1]], [[PAGE, PAGE]]], dtype=torch.int32)
    tables = torch.zeros((2, 1, 2, 3), dtype=torch.int32)
    used = torch.tensor([2])
    before = lens.clone(), tables.clone(), used.clone()
    with pytest.raises(ValueError, match="outgrew its slabs"):
        grow(lens, tables, torch.arange(9)[None], used, torch.tensor([4]), PAGE)
    assert all(map(torch.equal, (lens, tables, used), before))


@settings(max_examples=60, deadline=None)
@given(heads=st.integers(1, 3), n=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_compact(heads: int, n: int, seed: int) -> None:
    generator = _generator(seed)
    blocks = -(-n // PAGE)
    memory = torch.randn((4 * heads * blocks, 2, PAGE, 3), generator=generator)
    order = torch.randperm(memory.shape[0], generator=generator)
    source = order[: heads * blocks].view(blocks, heads)
    tables = order[heads * blocks : 2 * heads * blocks].view(heads, blocks).int()
    kept = torch.rand((heads, n), generator=generator) < 0.5
    kept[:, -1] = True
    lens = kept.sum(dim=1, dtype=torch.int32)
    other = memory.clone()
    compact(kept, PagedCache(memory[:, 0], memory[:, 1]), source, tables, lens)
    compact.reference(kept, PagedCache(other[:, 0], other[:, 1]), source, tables, lens)
    assert torch.equal(memory, other)
