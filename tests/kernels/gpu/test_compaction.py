"""Compaction against the entry-by-entry reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adakv_serve.kernels.gpu.compaction import (
    compact_paged,
    compact_pages_in_place,
)
from adakv_serve.kernels.paging.paged_cache import PagedCache, compact, compact_in_place

CASES = [
    # K, H, n, D, page, share kept
    (1, 1, 1, 64, 16, 1.0),
    (2, 3, 50, 64, 16, 0.5),
    (1, 2, 300, 128, 32, 0.25),
    (2, 1, 130, 80, 16, 0.9),
    (1, 2, 2500, 64, 32, 0.06),
]


class Memory:
    """Shuffled pages of a few layers, keys beside values in each row."""

    def __init__(self, case: tuple, dtype: torch.dtype, device: torch.device) -> None:
        layers, heads, n, dim, page_tokens, share = case
        generator = torch.Generator().manual_seed(n)
        blocks = -(-n // page_tokens)
        half = layers * heads * blocks
        self.content = torch.randn((3 * half, page_tokens, 2 * dim), generator=generator).to(
            device, dtype
        )
        order = torch.randperm(3 * half, generator=generator)
        self.source = order[:half].view(layers, blocks, heads).to(device)
        self.tables = order[half : 2 * half].view(layers, heads, blocks).int().to(device)
        kept = torch.rand((layers, heads, n), generator=generator) < share
        kept[..., -1] = True
        self.kept = kept.to(device)
        self.lens = self.kept.sum(dim=-1, dtype=torch.int32)

    @property
    def cache(self) -> PagedCache:
        keys, values = self.content.chunk(2, dim=-1)
        return PagedCache(keys, values)

    def rows(self, pool: Tensor) -> Tensor:
        """Return all kept entries of `tables` in pool [pages, page_tokens, ...], head by head."""
        heads = zip(self.tables.flatten(0, 1).long(), self.lens.flatten().tolist(), strict=True)
        return torch.cat([pool[table].flatten(0, 1)[:length] for table, length in heads])


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_shapes(data: st.DataObject, device: torch.device) -> None:
    case = (
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3)),
        data.draw(st.integers(1, 3000 if device.type == "cuda" else 300)),
        data.draw(st.sampled_from([64, 80, 96, 128, 192, 256])),
        data.draw(st.sampled_from([16, 32, 64])),
        data.draw(st.floats(0, 1)),
    )
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    test_kept_entries_are_copied(case, dtype, device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_kept_entries_are_copied(case: tuple, dtype: torch.dtype, device: torch.device) -> None:
    ours, reference = Memory(case, dtype, device), Memory(case, dtype, device)
    compact_paged(ours.kept, ours.cache, ours.source, ours.tables, ours.lens)
    compact.reference(
        reference.kept, reference.cache, reference.source, reference.tables, reference.lens
    )
    assert torch.equal(ours.content, reference.content)


def test_a_long_prompt_is_listed_in_parts(device: torch.device) -> None:
    case = (2, 2, 128 * 1024 if device.type == "cuda" else 40_000, 64, 16, 0.25)
    ours = Memory(case, torch.bfloat16, device)
    reference = Memory(case, torch.bfloat16, torch.device("cpu"))
    compact_paged(ours.kept, ours.cache, ours.source, ours.tables, ours.lens)
    # The CPU's path: entry by entry would take minutes.
    compact(reference.kept, reference.cache, reference.source, reference.tables, reference.lens)
    assert torch.equal(ours.content.cpu(), reference.content)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_place_they_move_to_the_front(case: tuple, device: torch.device) -> None:
    ours, reference = (Memory(case, torch.bfloat16, device) for _ in range(2))
    compact_pages_in_place(ours.kept, ours.cache, ours.tables, ours.lens)
    compact_in_place.reference(reference.kept, reference.cache, reference.tables, reference.lens)
    assert torch.equal(ours.rows(ours.content), reference.rows(reference.content))
