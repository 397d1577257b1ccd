"""Each fast path against its reference, on random input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_serve.kernels.paging.entries import PART_BYTES
from adakv_serve.kernels.paging.growth import DecodeBatch, grow_reference
from adakv_serve.kernels.paging.paged_cache import PagedCache, compact
from adakv_serve.kernels.policies.attention import (
    Reduction,
    attention_rows,
    reduced_window_attention,
)
from adakv_serve.kernels.policies.top import top_mask
from tests.kernels.paging import in_pages

PAGE = 4


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(max_examples=60, deadline=None)
@given(
    heads=st.integers(1, 4),
    group=st.integers(1, 4),
    window=st.integers(1, 8),
    older=st.integers(0, 40),
    page_tokens=st.sampled_from([4, 16]),
    by_dimension=st.booleans(),
    reduction=st.sampled_from(["mean", "max", "squares"]),
    seed=st.integers(0, 10**6),
)
def test_reduced_window_attention(
    heads: int,
    group: int,
    window: int,
    older: int,
    page_tokens: int,
    by_dimension: bool,
    reduction: Reduction,
    seed: int,
) -> None:
    generator = _generator(seed)
    queries = torch.randn((heads, group, window, 8), generator=generator)
    n = window + older
    keys = torch.randn((heads, n, 8), generator=generator)
    reference = reduced_window_attention.reference(queries, keys, 0.3, reduction)
    torch.testing.assert_close(reduced_window_attention(queries, keys, 0.3, reduction), reference)
    paged = in_pages(keys, page_tokens, generator, by_dimension=by_dimension)
    torch.testing.assert_close(reduced_window_attention(queries, paged, 0.3, reduction), reference)


@pytest.mark.parametrize("reduction", ["mean", "max", "squares"])
@pytest.mark.parametrize("window", [8, 200])
def test_attention_over_many_keys_is_computed_in_parts(window: int, reduction: Reduction) -> None:
    generator = _generator(window)
    queries = torch.randn((2, 2, window, 256), generator=generator)
    keys = torch.randn((2, 40_003, 256), generator=generator)
    parts = [part.attention.numel() for part in attention_rows(queries, keys, 0.1)]
    assert max(parts) * 4 <= PART_BYTES
    assert len(parts) > 2 or window == 8
    paged = in_pages(keys, 32, generator)
    reference = reduced_window_attention.reference(queries, keys, 0.1, reduction)
    torch.testing.assert_close(reduced_window_attention(queries, paged, 0.1, reduction), reference)


@pytest.mark.parametrize("kind", ["distinct", "tied", "not numbers"])
def test_the_largest_of_many_scores_are_found_in_parts(kind: str) -> None:
    scores = torch.randn((2, 2_500_000), generator=_generator(1))
    if kind == "tied":
        scores = scores.mul_(2).round_()
    if kind == "not numbers":
        scores[:, ::7], scores[:, 1::7], scores[:, 2::7] = torch.nan, torch.inf, -torch.inf
    counts = torch.tensor([0, 1_700_001])
    mask = top_mask(scores, counts)
    assert torch.equal(mask, top_mask.reference(scores, counts))


@settings(max_examples=200, deadline=None)
@given(rows=st.integers(1, 3), m=st.integers(1, 40), seed=st.integers(0, 10**6), data=st.data())
def test_top_mask(rows: int, m: int, seed: int, data: st.DataObject) -> None:
    values = torch.tensor([0.0, -0.0, 1.0, 2.0, torch.nan, torch.inf, -torch.inf])
    scores = values[torch.randint(0, len(values), (rows, m), generator=_generator(seed))]
    counts = torch.tensor(data.draw(st.lists(st.integers(0, m), min_size=rows, max_size=rows)))
    mask = top_mask(scores, counts)
    assert torch.equal(mask.sum(dim=1), counts)
    assert torch.equal(mask, top_mask.reference(scores, counts))


@settings(max_examples=60, deadline=None)
@given(
    layers=st.integers(1, 3),
    requests=st.integers(1, 3),
    heads=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 12),
)
def test_a_decode_batch(layers: int, requests: int, heads: int, seed: int, steps: int) -> None:
    generator = _generator(seed)
    shape = (layers, requests, heads)
    lens = torch.randint(0, 12, shape, generator=generator, dtype=torch.int32)
    width = 12 // PAGE + steps // PAGE + 2
    tables = torch.randint(0, 99, (*shape, width), generator=generator, dtype=torch.int32)
    used = torch.randint(0, 3, (requests,), generator=generator).tolist()

    def next_page(request: int, ordinal: int) -> int:
        return 1000 * request + ordinal

    batch = DecodeBatch(lens.clone(), tables.clone(), list(used), PAGE)
    for _ in range(steps):
        slots = grow_reference(lens, tables, used, PAGE, next_page)
        assert batch.is_wide_enough
        step = batch.grow(next_page)
        assert torch.equal(step.slots, slots)
        assert torch.equal(step.lens.view(shape), lens)
        assert torch.equal(step.tables.view(tables.shape), tables)
        assert batch.used == used


def test_without_a_page_nothing_grows() -> None:
    lens = torch.tensor([[[PAGE, 1]], [[PAGE, PAGE]]], dtype=torch.int32)
    tables = torch.zeros((2, 1, 2, 3), dtype=torch.int32)
    batch = DecodeBatch(lens.clone(), tables.clone(), [2], PAGE)
    with pytest.raises(ValueError, match="outgrew its slabs"):
        batch.grow(lambda request, ordinal: ordinal if ordinal < 4 else None)
    assert torch.equal(batch.lens, lens)
    assert torch.equal(batch.tables, tables)
    assert batch.used == [2]


@settings(max_examples=60, deadline=None)
@given(heads=st.integers(1, 3), n=st.integers(1, 20), seed=st.integers(0, 10**6))
def test_compact(heads: int, n: int, seed: int) -> None:
    generator = _generator(seed)
    layers, blocks = 2, -(-n // PAGE)
    half = layers * heads * blocks
    memory = torch.randn((3 * half, 2, PAGE, 3), generator=generator)
    order = torch.randperm(memory.shape[0], generator=generator)
    source = order[:half].view(layers, blocks, heads)
    tables = order[half : 2 * half].view(layers, heads, blocks).int()
    kept = torch.rand((layers, heads, n), generator=generator) < 0.5
    kept[..., -1] = True
    lens = kept.sum(dim=-1, dtype=torch.int32)
    other = memory.clone()
    compact(kept, PagedCache(memory[:, 0], memory[:, 1]), source, tables, lens)
    compact.reference(kept, PagedCache(other[:, 0], other[:, 1]), source, tables, lens)
    assert torch.equal(memory, other)
