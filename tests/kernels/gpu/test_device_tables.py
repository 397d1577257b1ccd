"""Page tables on the device: the properties of all page tables, and equality with the host's."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from adakv_serve.kernels.gpu.device_tables import DeviceTables
from adakv_serve.kernels.paging.host_tables import HostTables
from adakv_serve.kernels.paging.layout import PageLayout
from adakv_serve.kernels.paging.pages import check_page_tables
from tests.kernels.page_tables import (
    LAYOUTS,
    MakeTables,
    check_many_requests,
    check_random_lives,
    check_shrinking,
    check_too_few_slabs,
)

PAGE, ROWS, BLOCKS = 4, 4, 64
LAYERS, HEADS = 3, 2


def make_on(device: torch.device) -> MakeTables:
    return lambda layout, rows: DeviceTables(layout.to(device), PAGE, rows)


class Pair:
    """Tables of both kinds that take the same operations."""

    def __init__(self, device: torch.device) -> None:
        layout = PageLayout.blocks_outermost(LAYERS, HEADS)
        self.host = HostTables(layout, PAGE, ROWS)
        self.device = DeviceTables(layout.to(device), PAGE, ROWS, graph_columns=4)
        self.free = list(range(BLOCKS))
        self.slabs: dict[int, list[int]] = {}
        self.places: tuple[int, ...] | None = None

    def take(self, count: int) -> list[int]:
        taken, self.free = self.free[:count], self.free[count:]
        return taken

    def place(self, lens: Tensor) -> None:
        pages = int((-(-lens // PAGE)).sum())
        slabs = self.take(-(-pages // (LAYERS * HEADS)) + 1)
        rows = {tables.place(lens, slabs) for tables in (self.host, self.device)}
        assert len(rows) == 1
        self.slabs[rows.pop()] = slabs

    def grow(self, rows: list[int], graph_rows: int | None = None) -> None:
        """Grow both; `graph_rows` counts only for heads that fit graphs."""
        for row in rows:
            used = self.host.used_pages(row)
            while used + LAYERS * HEADS > len(self.slabs[row]) * LAYERS * HEADS:
                (slab,) = self.take(1)
                self.slabs[row].append(slab)
                self.host.add_slabs(row, [slab])
                self.device.add_slabs(row, [slab])
        for row in rows:
            assert self.device.longest(row) >= int(self.host.lens(row).max())
        if not self.device.fits_graphs(rows):
            graph_rows = None
        expected, got = self.host.grow(rows), self.device.grow(rows, graph_rows)
        mine = len(rows) * HEADS
        assert torch.equal(got.slots[:, :mine].cpu(), expected.slots)
        assert torch.equal(got.lens[:, :mine].cpu(), expected.lens)
        assert (got.slots[:, mine:] == -1).all()
        assert (got.lens[:, mine:] == 1).all()
        if graph_rows is not None:
            assert got.tables.shape[1] == graph_rows * HEADS
            places = got.tables.data_ptr(), got.lens.data_ptr(), got.slots.data_ptr()
            assert places == self.places or self.places is None
            self.places = places

    def shrink(self, row: int, keep: Tensor) -> None:
        lens = (self.host.lens(row) * keep).int()
        pages = int((-(-lens // PAGE)).sum())
        slabs = max(1, -(-pages // (LAYERS * HEADS)))
        expected = self.host.shrink(row, lens, slabs)
        got = self.device.shrink(row, lens.to(self.device.device), slabs)
        for mine, theirs in zip(got, expected, strict=True):
            assert torch.equal(mine.cpu(), theirs)
        self.free += self.slabs[row][slabs:]
        self.slabs[row] = self.slabs[row][:slabs]

    def release(self, row: int) -> None:
        self.free += self.slabs.pop(row)
        self.host.release(row)
        self.device.release(row)

    def check(self) -> None:
        check_page_tables(self.device, list(self.slabs))
        for row in self.slabs:
            assert torch.equal(self.device.lens(row).cpu(), self.host.lens(row))
            assert torch.equal(self.device.filled_pages(row).cpu(), self.host.filled_pages(row))


@settings(max_examples=15)
@given(data=st.data())
def test_they_equal_the_hosts_under_random_operations(
    device: torch.device, data: st.DataObject
) -> None:
    pair = Pair(device)
    lens = st.lists(st.integers(1, 11), min_size=LAYERS * HEADS, max_size=LAYERS * HEADS)

    def some_lens() -> Tensor:
        return torch.tensor(data.draw(lens), dtype=torch.int32).view(LAYERS, HEADS)

    for _ in range(data.draw(st.integers(1, 12))):
        rows = sorted(pair.slabs)
        deeds = ["place"] if len(rows) < ROWS else []
        deeds += ["grow", "grow", "shrink", "release"] if rows else []
        deed = data.draw(st.sampled_from(deeds))
        if deed == "place":
            pair.place(some_lens())
        elif deed == "grow":
            together = data.draw(st.permutations(rows))[: data.draw(st.integers(1, len(rows)))]
            graph_rows = data.draw(st.none() | st.integers(len(together), ROWS))
            for _ in range(data.draw(st.integers(1, 6))):
                pair.grow(together, graph_rows)
        elif deed == "shrink":
            pair.shrink(data.draw(st.sampled_from(rows)), some_lens() / 11)
        else:
            pair.release(data.draw(st.sampled_from(rows)))
    pair.check()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@settings(max_examples=10)
@given(data=st.data())
def test_random_lives_keep_every_entry_and_fit_the_bound(
    device: torch.device, layout: PageLayout, data: st.DataObject
) -> None:
    check_random_lives(make_on(device), layout, data)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@settings(max_examples=10)
@given(data=st.data())
def test_a_shrunk_request_keeps_its_first_entries_in_its_first_slabs(
    device: torch.device, layout: PageLayout, data: st.DataObject
) -> None:
    check_shrinking(make_on(device), layout, data)


def test_too_few_slabs_change_nothing(device: torch.device) -> None:
    check_too_few_slabs(make_on(device))


def test_tables_grow_with_their_requests(device: torch.device) -> None:
    check_many_requests(make_on(device))


def test_steps_without_requests_leave_no_trace(device: torch.device) -> None:
    layout = PageLayout.blocks_outermost(LAYERS, HEADS).to(device)
    tables = DeviceTables(layout, PAGE, ROWS, graph_columns=2)
    before = tables.nbytes
    for _ in range(20 * PAGE):
        step = tables.grow([], graph_rows=2)
        assert (step.slots == -1).all()
    row = tables.open([1])
    tables.release(row)
    assert tables.nbytes == before


def test_only_short_enough_heads_grow_where_graphs_read(device: torch.device) -> None:
    layout = PageLayout.blocks_outermost(LAYERS, HEADS).to(device)
    tables = DeviceTables(layout, PAGE, ROWS, graph_columns=2)
    row = tables.place(torch.full((LAYERS, HEADS), 2 * PAGE - 2, dtype=torch.int32), [1, 2, 3])
    assert tables.fits_graphs([row])
    tables.grow([row], graph_rows=2)
    tables.grow([row], graph_rows=1)
    assert not tables.fits_graphs([row])
    assert (tables.grow([row]).lens == 2 * PAGE + 1).all()
    other = tables.place(torch.ones((LAYERS, HEADS), dtype=torch.int32), [4])
    assert tables.fits_graphs([other])
    tables.share_longest([other], lambda longest: longest.fill_(2 * PAGE))
    assert not tables.fits_graphs([other])
    assert not DeviceTables(layout, PAGE, ROWS).fits_graphs([])
