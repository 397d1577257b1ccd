"""Page tables under random placements, growth and release, against a plain model of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.blocks import compressed_blocks_bound
from kernels.paging.paged_cache import (
    PagedCache,
    move_pages,
    placed_slots,
    read_heads,
    read_slots,
    write_slots,
)
from kernels.paging.pages import PageLayout, PageTables, check_page_tables

PAGE = 4
LAYERS, HEADS, BLOCKS = 3, 2, 64
LAYOUTS = {
    "layers outermost": PageLayout.layers_outermost(LAYERS, HEADS, BLOCKS),
    "blocks outermost": PageLayout.blocks_outermost(LAYERS, HEADS),
}


def _lens(data: st.DataObject, keep: int) -> torch.Tensor:
    """A random split of L * H * keep entries, at least one for each head."""
    spare = LAYERS * HEADS * (keep - 1)
    cuts = sorted(
        data.draw(
            st.lists(
                st.integers(0, spare), min_size=LAYERS * HEADS - 1, max_size=LAYERS * HEADS - 1
            )
        )
    )
    parts = [b - a + 1 for a, b in zip([0, *cuts], [*cuts, spare], strict=True)]
    return torch.tensor(parts, dtype=torch.int32).view(LAYERS, HEADS)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_lives_keep_every_entry_and_fit_the_bound(
    layout: PageLayout, data: st.DataObject
) -> None:
    tables = PageTables(layout, PAGE, rows=3)
    free = list(range(1, BLOCKS))
    live: dict[int, dict] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["place", "grow", "release"]))
        if action == "place" and len(live) < 3:
            keep = data.draw(st.integers(1, 20))
            slabs = [free.pop() for _ in range(compressed_blocks_bound(keep, 0, PAGE))]
            lens = _lens(data, keep)
            row = tables.place(lens, slabs)
            live[row] = {"keep": keep, "grown": 0, "slabs": slabs, "lens": lens}
        elif action == "grow" and live:
            rows = data.draw(st.permutations(sorted(live)))[: data.draw(st.integers(1, 3))]
            for row in rows:
                request = live[row]
                request["grown"] += 1
                bound = compressed_blocks_bound(request["keep"], request["grown"], PAGE)
                granted = [free.pop() for _ in range(bound - len(request["slabs"]))]
                request["slabs"] += granted
                tables.add_slabs(row, granted)
            before = {row: _slots(tables, row) for row in rows}
            step = tables.grow(rows)
            step = step._replace(slots=step.slots.clone(), lens=step.lens.clone())
            for index, row in enumerate(rows):
                for (layer, head), old in before[row].items():
                    now = _entries(tables, row, layer, head)
                    assert now[:-1] == old
                    assert now[-1] == int(step.slots[layer, index * HEADS + head])
                    assert len(now) == int(step.lens[layer, index * HEADS + head])
        elif action == "release" and live:
            row = data.draw(st.sampled_from(sorted(live)))
            free += live.pop(row)["slabs"]
            tables.release(row)
        check_page_tables(tables, sorted(live))
        for row, request in live.items():
            assert torch.equal(tables.lens(row), request["lens"] + request["grown"])


def _slots(tables: PageTables, row: int) -> dict[tuple[int, int], list[int]]:
    return {
        (layer, head): _entries(tables, row, layer, head)
        for layer in range(LAYERS)
        for head in range(HEADS)
    }


def _entries(tables: PageTables, row: int, layer: int, head: int) -> list[int]:
    """Slots of one head's entries, in the order they were placed."""
    positions = torch.arange(int(tables.lens(row)[layer, head]))
    pages = tables.tables(row)[layer, head].long()[positions // PAGE]
    return (pages * PAGE + positions % PAGE).tolist()


def test_too_few_slabs_change_nothing() -> None:
    tables = PageTables(LAYOUTS["layers outermost"], PAGE, rows=1)
    with pytest.raises(ValueError, match="do not fit"):
        tables.place(torch.full((LAYERS, HEADS), 5, dtype=torch.int32), [1])
    row = tables.place(torch.full((LAYERS, HEADS), 4, dtype=torch.int32), [1])
    with pytest.raises(ValueError, match="outgrew"):
        tables.grow([row])
    assert int(tables.lens(row).max()) == 4
    check_page_tables(tables, [row])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_what_is_read_from_blocks_and_written_to_pages_comes_back(layout: PageLayout) -> None:
    dim = 8
    generator = torch.Generator().manual_seed(0)
    pool = torch.randn((BLOCKS * LAYERS * HEADS, 2, PAGE * dim), generator=generator)
    # Keys packed dimension-major, as the CPU kernels do.
    cache = PagedCache(
        pool[:, 0].view(-1, dim, PAGE).transpose(1, 2), pool[:, 1].view(-1, PAGE, dim)
    )
    tables = PageTables(layout, PAGE, rows=1)
    lens = torch.tensor([[3, 5], [4, 4], [1, 7]], dtype=torch.int32)
    row = tables.place(lens, [7, 9])
    blocks = torch.tensor([3, 20, 5])
    pages = layout.block_pages(blocks, 1).t()
    keys, values = read_heads(cache.keys, pages), read_heads(cache.values, pages)
    page = int(layout.block_pages(torch.tensor([20]), 1)[0, 1])
    assert torch.equal(keys[1, 4:8], cache.keys[page])
    kept = torch.tensor([0, 2, 3, 10])
    slots = placed_slots(tables.tables(row)[1], tables.lens(row)[1], PAGE)
    assert slots.tolist() == [*_entries(tables, row, 1, 0), *_entries(tables, row, 1, 1)]
    write_slots(cache, slots, keys[:, kept].reshape(-1, dim), values[:, kept].reshape(-1, dim))
    for head in range(HEADS):
        back = read_slots(cache, torch.tensor(_entries(tables, row, 1, head)))
        assert torch.equal(back[0], keys[head, kept])
        assert torch.equal(back[1], values[head, kept])


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_what_shrinks_keeps_its_first_entries_in_its_first_slabs(
    layout: PageLayout, data: st.DataObject
) -> None:
    tables = PageTables(layout, PAGE, rows=1)
    before = data.draw(st.integers(2, 30))
    slabs = data.draw(st.permutations(range(1, BLOCKS)))[: compressed_blocks_bound(before, 0, PAGE)]
    lens = _lens(data, before)
    row = tables.place(lens, slabs)
    shape = (BLOCKS * LAYERS * HEADS, PAGE, 2)
    cache = PagedCache(torch.zeros(shape), torch.zeros(shape))
    slots = placed_slots(tables.tables(row).flatten(0, 1), lens.flatten(), PAGE)
    content = torch.rand((len(slots), 2))
    write_slots(cache, slots, content, -content)

    left = torch.stack([torch.tensor(data.draw(st.integers(1, int(n)))) for n in lens.flatten()])
    mean = -(-int(left.sum()) // left.numel())
    kept_slabs = compressed_blocks_bound(mean, 0, PAGE)
    sources, targets = tables.shrink(row, left.view_as(lens).int(), kept_slabs)
    assert not set(sources.tolist()) & set(targets.tolist())
    move_pages(cache, sources, targets)
    check_page_tables(tables, [row])
    assert (
        tables.pages(row).tolist() == layout.slab_pages(torch.tensor(slabs[:kept_slabs])).tolist()
    )
    slots = placed_slots(tables.tables(row).flatten(0, 1), left, PAGE)
    first = torch.cat(
        [
            part[:count]
            for part, count in zip(content.split(lens.flatten().tolist()), left, strict=True)
        ]
    )
    keys, values = read_slots(cache, slots)
    assert torch.equal(keys, first)
    assert torch.equal(values, -first)

    for grown in range(1, 2 * PAGE):
        more = compressed_blocks_bound(mean, grown, PAGE) - kept_slabs
        tables.add_slabs(row, slabs[kept_slabs : kept_slabs + more] if more > 0 else [])
        kept_slabs += max(0, min(more, len(slabs) - kept_slabs))
        if kept_slabs < compressed_blocks_bound(mean, grown, PAGE):
            break
        tables.grow([row])
        check_page_tables(tables, [row])


def test_too_few_slabs_leave_a_request_as_it_was() -> None:
    tables = PageTables(LAYOUTS["layers outermost"], PAGE, rows=1)
    lens = torch.full((LAYERS, HEADS), 9, dtype=torch.int32)
    row = tables.place(lens, [1, 2, 3])
    with pytest.raises(ValueError, match="do not fit into 1 slabs"):
        tables.shrink(row, lens - 1, 1)
    assert torch.equal(tables.lens(row), lens)
    check_page_tables(tables, [row])


def test_tables_grow_with_their_requests() -> None:
    tables = PageTables(LAYOUTS["blocks outermost"], PAGE, rows=20)
    lens = torch.ones((LAYERS, HEADS), dtype=torch.int32)
    held = []
    rows = []
    for slab in range(20):
        rows.append(tables.place(lens * (1 + slab % PAGE), [slab]))
        held.append(tables.nbytes)
    assert rows == list(range(20))
    assert held[0] < held[-1] / 8
    check_page_tables(tables, rows)
    for slab, row in enumerate(rows):
        assert torch.equal(tables.lens(row), lens * (1 + slab % PAGE))
