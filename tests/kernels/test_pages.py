"""Page tables in the host's memory under random placements, growth, shrinking and release."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_serve.kernels.paging.host_tables import HostTables
from adakv_serve.kernels.paging.layout import PageLayout
from adakv_serve.kernels.paging.paged_cache import (
    PagedCache,
    placed_slots,
    read_heads,
    read_slots,
    write_slots,
)
from adakv_serve.kernels.paging.pages import check_page_tables
from tests.kernels.page_tables import (
    BLOCKS,
    HEADS,
    LAYERS,
    LAYOUTS,
    PAGE,
    check_many_requests,
    check_random_lives,
    check_shrinking,
    check_too_few_slabs,
    entries,
)


def make(layout: PageLayout, rows: int) -> HostTables:
    return HostTables(layout, PAGE, rows)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@settings(max_examples=60)
@given(data=st.data())
def test_random_lives_keep_every_entry_and_fit_the_bound(
    layout: PageLayout, data: st.DataObject
) -> None:
    check_random_lives(make, layout, data)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@settings(max_examples=60)
@given(data=st.data())
def test_a_shrunk_request_keeps_its_first_entries_in_its_first_slabs(
    layout: PageLayout, data: st.DataObject
) -> None:
    check_shrinking(make, layout, data)


def test_too_few_slabs_change_nothing() -> None:
    check_too_few_slabs(make)


def test_tables_grow_with_their_requests() -> None:
    check_many_requests(make)


def test_a_request_that_outgrows_its_slabs_stays_as_it_was() -> None:
    tables = make(LAYOUTS["layers outermost"], 1)
    row = tables.place(torch.full((LAYERS, HEADS), 4, dtype=torch.int32), [1])
    with pytest.raises(ValueError, match="outgrew"):
        tables.grow([row])
    assert int(tables.lens(row).max()) == 4
    check_page_tables(tables, [row])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_entries_read_from_blocks_come_back_from_pages(layout: PageLayout) -> None:
    dim = 8
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn((BLOCKS * LAYERS * HEADS, 2, PAGE * dim), generator=generator)
    # Keys packed dimension-major, as the CPU kernels do.
    cache = PagedCache(
        pool[:, 0].view(-1, dim, PAGE).transpose(1, 2), pool[:, 1].view(-1, PAGE, dim)
    )
    tables = make(layout, 1)
    lens = torch.tensor([[3, 5], [4, 4], [1, 7]], dtype=torch.int32)
    row = tables.place(lens, [7, 9])
    blocks = torch.tensor([3, 20, 5])
    pages = layout.block_pages(blocks, 1).t()
    keys, values = read_heads(cache.keys, pages), read_heads(cache.values, pages)
    page = int(layout.block_pages(torch.tensor([20]), 1)[0, 1])
    assert torch.equal(keys[1, 4:8], cache.keys[page])
    kept = torch.tensor([0, 2, 3, 10])
    slots = placed_slots(tables.tables(row)[1], tables.lens(row)[1], PAGE)
    assert slots.tolist() == [*entries(tables, row, 1, 0), *entries(tables, row, 1, 1)]
    write_slots(cache, slots, keys[:, kept].reshape(-1, dim), values[:, kept].reshape(-1, dim))
    for head in range(HEADS):
        back = read_slots(cache, torch.tensor(entries(tables, row, 1, head)))
        assert torch.equal(back[0], keys[head, kept])
        assert torch.equal(back[1], values[head, kept])
