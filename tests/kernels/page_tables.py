"""The properties that all page tables have, whatever holds them.

`make` gives the tables under test, for a layout and a number of rows.
"""

from collections.abc import Callable

import pytest
import torch
from hypothesis import strategies as st

from adakv_serve.kernels.blocks import compressed_blocks_bound
from adakv_serve.kernels.paging.layout import PageLayout
from adakv_serve.kernels.paging.paged_cache import PagedCache, move_pages, read_slots, write_slots
from adakv_serve.kernels.paging.pages import PageTables, check_page_tables

PAGE = 4
LAYERS, HEADS, BLOCKS = 3, 2, 64
LAYOUTS = {
    "layers outermost": PageLayout.layers_outermost(LAYERS, HEADS, BLOCKS),
    "blocks outermost": PageLayout.blocks_outermost(LAYERS, HEADS),
}

MakeTables = Callable[[PageLayout, int], PageTables]


def draw_lens(data: st.DataObject, keep: int) -> torch.Tensor:
    """Draw a split of L * H * keep entries, at least one for each head."""
    spare = LAYERS * HEADS * (keep - 1)
    count = LAYERS * HEADS - 1
    cuts = sorted(data.draw(st.lists(st.integers(0, spare), min_size=count, max_size=count)))
    parts = [b - a + 1 for a, b in zip([0, *cuts], [*cuts, spare], strict=True)]
    return torch.tensor(parts, dtype=torch.int32).view(LAYERS, HEADS)


def entries(tables: PageTables, row: int, layer: int, head: int) -> list[int]:
    """Return the slots of one head's entries in the order of their placement."""
    positions = torch.arange(int(tables.lens(row)[layer, head]))
    pages = tables.tables(row)[layer, head].cpu().long()[positions // PAGE]
    return (pages * PAGE + positions % PAGE).tolist()


def slots_by_head(tables: PageTables, row: int) -> dict[tuple[int, int], list[int]]:
    return {
        (layer, head): entries(tables, row, layer, head)
        for layer in range(LAYERS)
        for head in range(HEADS)
    }


def check_random_lives(make: MakeTables, layout: PageLayout, data: st.DataObject) -> None:
    """Place, grow and release: every entry stays where it is, and all fit their bound."""
    tables = make(layout, 3)
    free = list(range(1, BLOCKS))
    live: dict[int, dict] = {}
    for _ in range(data.draw(st.integers(1, 25))):
        action = data.draw(st.sampled_from(["place", "grow", "extend", "release"]))
        if action == "place" and len(live) < 3:
            keep = data.draw(st.integers(1, 20))
            slabs = [free.pop() for _ in range(compressed_blocks_bound(keep, 0, PAGE))]
            lens = draw_lens(data, keep)
            live[tables.place(lens, slabs)] = {
                "keep": keep, "grown": 0, "slabs": slabs, "lens": lens,
            }  # fmt: skip
        elif action == "grow" and live:
            rows = data.draw(st.permutations(sorted(live)))[: data.draw(st.integers(1, 3))]
            _grow(tables, rows, live, free)
        elif action == "extend" and live:
            rows = data.draw(st.permutations(sorted(live)))[: data.draw(st.integers(1, 3))]
            tokens = [data.draw(st.integers(1, 3 * PAGE)) for _ in rows]
            _extend(tables, rows, tokens, live, free)
        elif action == "release" and live:
            row = data.draw(st.sampled_from(sorted(live)))
            free += live.pop(row)["slabs"]
            tables.release(row)
        check_page_tables(tables, sorted(live))
        for row, request in live.items():
            assert torch.equal(tables.lens(row).cpu(), request["lens"] + request["grown"])


def _grant(
    tables: PageTables, row: int, tokens: int, live: dict[int, dict], free: list[int]
) -> None:
    """Give a request the slabs for so many more tokens."""
    request = live[row]
    request["grown"] += tokens
    bound = compressed_blocks_bound(request["keep"], request["grown"], PAGE)
    granted = [free.pop() for _ in range(bound - len(request["slabs"]))]
    request["slabs"] += granted
    tables.add_slabs(row, granted)


def _extend(
    tables: PageTables,
    rows: list[int],
    tokens: list[int],
    live: dict[int, dict],
    free: list[int],
) -> None:
    before = {row: slots_by_head(tables, row) for row in rows}
    for row, count in zip(rows, tokens, strict=True):
        _grant(tables, row, count, live, free)
    step = tables.extend(rows, tokens)
    slots, lens = step.slots.cpu(), step.lens.cpu()
    assert slots.shape == (LAYERS, sum(tokens) * HEADS)
    first = 0
    for index, (row, count) in enumerate(zip(rows, tokens, strict=True)):
        own = slots[:, first : first + count * HEADS].view(LAYERS, count, HEADS)
        first += count * HEADS
        for (layer, head), old in before[row].items():
            now = entries(tables, row, layer, head)
            assert now[: len(old)] == old
            assert now[len(old) :] == own[layer, :, head].tolist()
            assert len(now) == int(lens[layer, index * HEADS + head])
            sequence = step.tables[layer, index * HEADS + head].cpu().long()
            positions = torch.arange(len(now))
            assert (sequence[positions // PAGE] * PAGE + positions % PAGE).tolist() == now


def _grow(tables: PageTables, rows: list[int], live: dict[int, dict], free: list[int]) -> None:
    for row in rows:
        _grant(tables, row, 1, live, free)
    before = {row: slots_by_head(tables, row) for row in rows}
    step = tables.grow(rows)
    # A step is good until the next call.
    slots, lens = step.slots.cpu().clone(), step.lens.cpu().clone()
    for index, row in enumerate(rows):
        for (layer, head), old in before[row].items():
            now = entries(tables, row, layer, head)
            assert now[:-1] == old
            assert now[-1] == int(slots[layer, index * HEADS + head])
            assert len(now) == int(lens[layer, index * HEADS + head])


def check_shrinking(make: MakeTables, layout: PageLayout, data: st.DataObject) -> None:
    """A shrunk request keeps each head's first entries in its first slabs, and can grow again."""
    tables = make(layout, 1)
    before = data.draw(st.integers(2, 30))
    slabs = data.draw(st.permutations(range(1, BLOCKS)))[: compressed_blocks_bound(before, 0, PAGE)]
    lens = draw_lens(data, before)
    row = tables.place(lens, slabs)
    shape = (BLOCKS * LAYERS * HEADS, PAGE, 2)
    cache = PagedCache(torch.zeros(shape), torch.zeros(shape))
    content = torch.rand((int(lens.sum()), 2))
    write_slots(cache, _all_slots(tables, row), content, -content)

    left = torch.stack([torch.tensor(data.draw(st.integers(1, int(n)))) for n in lens.flatten()])
    mean = -(-int(left.sum()) // left.numel())
    kept_slabs = compressed_blocks_bound(mean, 0, PAGE)
    moves = tables.shrink(row, left.view_as(lens).int().to(tables.device), kept_slabs)
    assert not set(moves.sources.tolist()) & set(moves.targets.tolist())
    move_pages(cache, moves.sources.cpu(), moves.targets.cpu())
    check_page_tables(tables, [row])
    own = layout.slab_pages(torch.tensor(slabs[:kept_slabs]))
    assert tables.pages(row).tolist() == own.tolist()
    parts = zip(content.split(lens.flatten().tolist()), left, strict=True)
    first = torch.cat([part[:count] for part, count in parts])
    keys, values = read_slots(cache, _all_slots(tables, row))
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


def _all_slots(tables: PageTables, row: int) -> torch.Tensor:
    return torch.tensor([slot for each in slots_by_head(tables, row).values() for slot in each])


def check_too_few_slabs(make: MakeTables) -> None:
    """Neither placing nor shrinking into too few slabs changes anything."""
    tables = make(LAYOUTS["blocks outermost"], 2)
    lens = torch.full((LAYERS, HEADS), 9, dtype=torch.int32)
    for _ in range(3):
        with pytest.raises(ValueError, match="18 pages do not fit into 6"):
            tables.place(lens, [1])
    row = tables.place(lens, [1, 2, 3])
    with pytest.raises(ValueError, match="do not fit into 1 slabs"):
        tables.shrink(row, lens.to(tables.device) - 1, 1)
    assert torch.equal(tables.lens(row).cpu(), lens)
    check_page_tables(tables, [row])


def check_many_requests(make: MakeTables) -> None:
    """Tables take memory for the requests that they have."""
    tables = make(LAYOUTS["blocks outermost"], 20)
    lens = torch.ones((LAYERS, HEADS), dtype=torch.int32)
    held, rows = [], []
    for slab in range(20):
        rows.append(tables.place(lens * (1 + slab % PAGE), [slab]))
        held.append(tables.nbytes)
    assert rows == list(range(20))
    assert held[0] < held[-1] / 8
    check_page_tables(tables, rows)
    for slab, row in enumerate(rows):
        assert torch.equal(tables.lens(row).cpu(), lens * (1 + slab % PAGE))
