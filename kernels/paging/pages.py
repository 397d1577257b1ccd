"""Pages: where the entries of each (layer, KV head) of a compressed request lie.

A page holds `page_tokens` entries of one KV head of one layer, keys and values. One KV block of
the engine is L * H pages. Blocks that belong to one compressed request alone are its slabs, and any
page of a slab may serve any (layer, head).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from adakv_serve.kernels.paging.growth import ExtendedStep, GrownStep
from adakv_serve.kernels.paging.layout import PageLayout


class PageMoves(NamedTuple):
    """Pages whose content the caller moves: ids [p] to read, and ids [p] to write."""

    sources: Tensor
    targets: Tensor


class PageTables(Protocol):
    """Page tables of compressed requests, each of which has a row; on the layout's device.

    Slabs are the caller's: a request's first pages are in use, in the order of its slabs.
    """

    layout: PageLayout
    page_tokens: int

    @property
    def layers(self) -> int:
        return self.layout.offsets.shape[0]

    @property
    def heads(self) -> int:
        return self.layout.offsets.shape[1]

    @property
    def device(self) -> torch.device:
        return self.layout.offsets.device

    @property
    def nbytes(self) -> int:
        """Bytes held beside the engine's KV memory."""
        ...

    def lens(self, row: int) -> Tensor:
        """Return entries [L, H] int32 of a request's heads; good until the next change."""
        ...

    def tables(self, row: int) -> Tensor:
        """Return page ids [L, H, W] int32; columns past the entries are undefined."""
        ...

    def pages(self, row: int) -> Tensor:
        """Return all page ids [slabs * L * H] that a request may use, in the order of use."""
        ...

    def used_pages(self, row: int) -> int:
        """Return how many of `pages` are in use."""
        ...

    def open(self, slabs: list[int]) -> int:
        """Give a request without entries its slabs, and return its row."""
        ...

    def place_layers(self, row: int, layers: list[int], lens: Tensor) -> Tensor:
        """Give the heads of K layers a request's next pages, for `lens` [K, H] entries.

        Returns their tables [K, H, W].

        Raises:
            ValueError: the slabs are too few; nothing has changed then.
        """
        ...

    def add_slabs(self, row: int, slabs: list[int]) -> None:
        """Append slabs that the scheduler granted for growth."""
        ...

    def shrink(self, row: int, lens: Tensor, slabs: int) -> PageMoves:
        """Leave a request the first `lens` [L, H] entries of each head, and its first slabs.

        The pages still needed become the first ones that it may use; their content must be moved.

        Raises:
            ValueError: the slabs are too few; nothing has changed then.
        """
        ...

    def release(self, row: int) -> None:
        """Take a request's row and slabs."""
        ...

    def grow(self, rows: list[int], graph_rows: int | None = None) -> GrownStep:
        """Add one entry to every head of the requests at `rows` [R].

        Args:
            graph_rows: N >= R rows of a CUDA graph, in which the step must lie where the graph
                reads; only where `fits_graphs`.
        """
        ...

    def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> ExtendedStep:
        """Add `tokens` [R] entries to every head of the requests at `rows` [R].

        Raises:
            ValueError: a request has too few pages left; nothing has changed then. Only where the
                host knows the used pages; elsewhere the entries' slots are -1.
        """
        ...

    def fits_graphs(self, rows: list[int]) -> bool:
        """Return whether these requests can grow where CUDA graphs read."""
        ...

    def share_longest(self, rows: list[int], most: Callable[[Tensor], Tensor]) -> None:
        """Account for the heads of other ranks, so that all ranks replay a graph or none does.

        Args:
            most: returns each number's maximum over all ranks.
        """
        ...

    def place(self, lens: Tensor, slabs: list[int]) -> int:
        """Open a row and place lens [L, H] of all layers in it.

        Raises:
            ValueError: the slabs are too few; nothing has changed then.
        """
        row = self.open(slabs)
        try:
            self.place_layers(row, list(range(self.layers)), lens)
        except ValueError:
            self.release(row)
            raise
        return row

    def filled_pages(self, row: int, lens: Tensor | None = None) -> Tensor:
        """Return page ids [p] that hold a request's entries: layer by layer, head by head.

        Args:
            lens: entries [L, H], the first ones of each head, if not all.
        """
        tables = self.tables(row)
        filled = self.pages_for(self.lens(row) if lens is None else lens.to(tables.device))
        return tables[columns(tables) < filled[..., None]].long()

    def pages_for(self, lens: Tensor) -> Tensor:
        """Return the number of pages, int64, for each of `lens` entries."""
        return -(-lens.long() // self.page_tokens)


class EntryTables:
    """Tensors of all rows of page tables, which grow in rows and in columns.

    lens: [rows, L, H] int32. pages: page ids [rows, L, H, W] int32.
    """

    def __init__(self, layout: PageLayout, rows: int) -> None:
        shape = (rows, *layout.offsets.shape)
        device = layout.offsets.device
        self.lens = torch.zeros(shape, dtype=torch.int32, device=device)
        self.pages = torch.zeros((*shape, 1), dtype=torch.int32, device=device)

    @property
    def nbytes(self) -> int:
        return self.lens.nbytes + self.pages.nbytes

    def add_rows(self, rows: int) -> None:
        """Make room for `rows` in all."""
        self.lens, self.pages = with_rows(self.lens, rows), with_rows(self.pages, rows)

    def widen(self, width: int) -> None:
        """Make room for `width` pages of each head."""
        have = self.pages.shape[-1]
        if width > have:
            # Steps of a quarter: each widening copies all tables.
            self.pages = nn.functional.pad(self.pages, (0, width + width // 4 + 1 - have))


def with_rows(held: Tensor, rows: int) -> Tensor:
    """Return `held` with rows of zeros appended up to `rows`."""
    return torch.cat((held, held.new_zeros((rows - len(held), *held.shape[1:]))))


def columns(tables: Tensor) -> Tensor:
    """Return the column numbers [W] of tables [..., W]."""
    return torch.arange(tables.shape[-1], device=tables.device)


def take_first_pages(tables: Tensor, needed: Tensor, order: Tensor) -> PageMoves:
    """Make a request's needed pages the first of those that it may use, in place.

    Args:
        tables: [L, H, W], the request's page ids.
        needed: [L, H], how many pages each head keeps.
        order: all page ids that it may use, in the order of use.
    """
    used = int(needed.sum())
    owned = columns(tables) < needed[..., None]
    mine = tables[owned].long()
    by_id = order.argsort()
    ordinals = by_id[torch.searchsorted(order[by_id], mine)]
    stays = torch.zeros(used, dtype=torch.bool, device=tables.device)
    stays[ordinals[ordinals < used]] = True
    moves = ordinals >= used
    targets = order[:used][~stays]
    sources = mine[moves]
    mine[moves] = targets
    tables[owned] = mine.int()
    return PageMoves(sources, targets)


def check_page_tables(tables: PageTables, rows: list[int]) -> None:
    """Assert that no page of `rows` is owned twice and that all lie in their request's slabs."""
    owned: set[int] = set()
    for row in rows:
        pages = tables.pages(row).tolist()
        granted = set(pages)
        assert len(granted) == len(pages), "a slab was granted twice"
        mine = tables.filled_pages(row).tolist()
        assert len(set(mine)) == len(mine), "a page serves two places of one request"
        assert set(mine) <= granted, "a page lies outside the request's slabs"
        assert len(mine) == tables.used_pages(row), "the page counter is wrong"
        assert set(mine) == set(pages[: len(mine)]), "a page was handed out of turn"
        assert not owned & granted, "a page belongs to two requests"
        owned |= granted
