"""Pages: where the entries of each (layer, KV head) of a compressed request lie.

A page holds `page_tokens` entries of one KV head of one layer, keys and values. One KV block of
the engine is L * H pages. Blocks that belong to one compressed request alone are its slabs, and any
page of a slab may serve any (layer, head).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.paging.growth import DecodeBatch, GrownStep


class PageLayout(NamedTuple):
    """Where the L * H pages of a block lie: page id = block * block_stride + offsets[i].

    offsets: [L, H] int64.
    """

    block_stride: int
    offsets: Tensor

    @classmethod
    def layers_outermost(cls, layers: int, heads: int, blocks: int) -> "PageLayout":
        """One region for each layer, with all its blocks (vLLM's LBHNC)."""
        layer_starts = torch.arange(layers)[:, None] * (blocks * heads)
        return cls(heads, layer_starts + torch.arange(heads))

    @classmethod
    def blocks_outermost(cls, layers: int, heads: int) -> "PageLayout":
        """One region for each block, with all its layers (vLLM's BLHNC)."""
        return cls(layers * heads, torch.arange(layers * heads).view(layers, heads))

    def to(self, device: torch.device) -> "PageLayout":
        return self._replace(offsets=self.offsets.to(device))

    @property
    def pages_per_block(self) -> int:
        return self.offsets.numel()

    def block_pages(self, blocks: Tensor, layer: int) -> Tensor:
        """Page ids [nb, H] of uncompressed blocks [nb] in `layer`."""
        return blocks[:, None] * self.block_stride + self.offsets[layer]

    def blocks_pages(self, blocks: Tensor, layers: Tensor) -> Tensor:
        """Page ids [K, nb, H] of uncompressed blocks [nb] in `layers` [K]."""
        return (blocks * self.block_stride)[:, None] + self.offsets[layers][:, None]

    def slab_pages(self, slabs: Tensor) -> Tensor:
        """Page ids [num_slabs * L * H] of slabs [num_slabs], in the order they are handed out."""
        return (slabs[:, None] * self.block_stride + self.offsets.view(-1)).view(-1)


# What page tables begin with; they double from there.
_FIRST_ROWS = 2


class PageTables:
    """Page tables of up to `rows` compressed requests; grows with them, and with what they hold.

    Pages of a request are handed out in the order of its slabs, and those in use are always the
    first, so that a counter is the whole allocator. They are on the layout's device.
    """

    def __init__(self, layout: PageLayout, page_tokens: int, rows: int) -> None:
        self.layout = layout
        self.page_tokens = page_tokens
        self.layers, self.heads = layout.offsets.shape
        self.device = layout.offsets.device
        self._most_rows = rows
        rows = min(rows, _FIRST_ROWS)
        shape = (rows, self.layers, self.heads)
        self._lens = torch.zeros(shape, dtype=torch.int32, device=self.device)
        self._tables = torch.zeros((*shape, 1), dtype=torch.int32, device=self.device)
        self._slabs: list[list[int]] = [[] for _ in range(rows)]
        self._used_pages = [0] * rows
        self._free_rows = list(range(rows - 1, -1, -1))
        self._offsets: list[int] = layout.offsets.flatten().tolist()
        # Decode batches rarely change from step to step. While one lasts it holds its rows' truth.
        self._batch: DecodeBatch | None = None
        self._batch_rows: list[int] = []

    @property
    def nbytes(self) -> int:
        """Bytes held beside the engine's KV memory."""
        held = sum(tensor.numel() * tensor.element_size() for tensor in (self._lens, self._tables))
        return held + (0 if self._batch is None else self._batch.nbytes)

    def lens(self, row: int) -> Tensor:
        """Entries [L, H] int32 of a request's heads."""
        self._end_batch()
        return self._lens[row]

    def tables(self, row: int) -> Tensor:
        """Page ids [L, H, W] int32 of a request, columns past the entries undefined."""
        self._end_batch()
        return self._tables[row]

    def filled_pages(self, row: int) -> Tensor:
        """Page ids [p] that hold a request's entries, layer after layer, head after head."""
        tables = self.tables(row).flatten(0, 1)
        counts = -(-self.lens(row).flatten() // self.page_tokens)
        return tables[self._columns(tables) < counts[:, None]].long()

    def pages(self, row: int) -> Tensor:
        """All page ids [num_slabs * L * H] that a request may use, in the order of use."""
        slabs = torch.tensor(self._slabs[row], dtype=torch.int64, device=self.device)
        return self.layout.slab_pages(slabs)

    def used_pages(self, row: int) -> int:
        """How many of `pages` are in use."""
        self._end_batch()
        return self._used_pages[row]

    def open(self, slabs: list[int]) -> int:
        """Gives a request without entries the pages of its slabs; returns its row."""
        if not self._free_rows:
            self._add_rows(min(len(self._slabs), self._most_rows - len(self._slabs)))
        row = self._free_rows.pop()
        self._slabs[row] = list(slabs)
        return row

    def place(self, lens: Tensor, slabs: list[int]) -> int:
        """`open` and `place_layers` for lens [L, H] of all layers.

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

    def place_layers(self, row: int, layers: list[int], lens: Tensor) -> Tensor:
        """Gives the heads of K layers the next pages of the request, for `lens` [K, H] entries.

        Returns their tables [K, H, W].

        Raises:
            ValueError: the slabs are too few.
        """
        self._end_batch()
        needed = -(-lens.long() // self.page_tokens)
        start, widest = self._used_pages[row], int(needed.max())
        end, granted = start + int(needed.sum()), len(self._slabs[row]) * len(self._offsets)
        if end > granted:
            raise ValueError(f"{end} pages do not fit into {granted}")
        self._widen(widest)
        # `nonzero` goes by layer, head and column: the order in which pages are handed out.
        owned = self._columns(self._tables) < needed[..., None]
        k, head, column = owned.nonzero(as_tuple=True)
        tables = torch.zeros(owned.shape, dtype=torch.int32, device=self.device)
        tables[k, head, column] = self.pages(row)[start:end].int()
        index = torch.tensor(layers, device=self.device)
        self._tables[row, index] = tables
        self._lens[row, index] = lens
        self._used_pages[row] = end
        return tables

    def add_slabs(self, row: int, slabs: list[int]) -> None:
        """Appends blocks that the scheduler granted for growth."""
        self._slabs[row] += slabs

    def shrink(self, row: int, lens: Tensor, slabs: int) -> tuple[Tensor, Tensor]:
        """Leaves a request the first entries of each head, and the first slabs.

        The pages still needed become the first that it may use; their content is the caller's to
        move.

        Args:
            lens: [L, H], at most what the heads hold.
            slabs: how many it keeps.

        Returns:
            Page ids [p] to move, and [p] where to.

        Raises:
            ValueError: the slabs are too few; nothing has changed then.
        """
        self._end_batch()
        needed = -(-lens.long() // self.page_tokens)
        used = int(needed.sum())
        if used > slabs * len(self._offsets):
            raise ValueError(f"{used} pages do not fit into {slabs} slabs")
        order = self.pages(row)
        tables = self._tables[row]
        owned = self._columns(tables) < needed[..., None]
        mine = tables[owned].long()
        by_id = order.argsort()
        ordinals = by_id[torch.searchsorted(order[by_id], mine)]
        stays = torch.zeros(used, dtype=torch.bool, device=self.device)
        stays[ordinals[ordinals < used]] = True
        moves = ordinals >= used
        targets = order[:used][~stays]
        sources = mine[moves]
        mine[moves] = targets
        tables[owned] = mine.int()
        self._lens[row] = lens
        self._used_pages[row] = used
        self._slabs[row] = self._slabs[row][:slabs]
        return sources, targets

    def release(self, row: int) -> None:
        self._end_batch()
        self._lens[row] = 0
        self._slabs[row] = []
        self._used_pages[row] = 0
        self._free_rows.append(row)

    def fits_graphs(self, rows: list[int]) -> bool:
        """Whether `grow` can be told `graph_rows` for these requests: see `DeviceTables`."""
        return False

    def share_longest(self, rows: list[int], most: Callable[[Tensor], Tensor]) -> None:
        """Account for the heads of other ranks: see `DeviceTables`."""

    def grow(self, rows: list[int], graph_rows: int | None = None) -> GrownStep:
        """Adds one entry to every head of the requests at `rows` [R].

        Raises:
            ValueError: a request has no page left; nothing has changed then.
        """
        assert graph_rows is None
        batch = self._batch
        if batch is None or rows != self._batch_rows or not batch.is_wide_enough:
            batch = self._begin_batch(rows)
        slabs = [self._slabs[row] for row in rows]
        offsets, stride = self._offsets, self.layout.block_stride
        each = len(offsets)

        def next_page(request: int, ordinal: int) -> int | None:
            slab, page = divmod(ordinal, each)
            if slab >= len(slabs[request]):
                return None
            return slabs[request][slab] * stride + offsets[page]

        return batch.grow(next_page)

    def _begin_batch(self, rows: list[int]) -> DecodeBatch:
        self._end_batch()
        index = torch.tensor(rows)
        lens = self._lens[index].transpose(0, 1).contiguous()
        self._widen(int(lens.max()) // self.page_tokens + 1)
        self._batch = DecodeBatch(
            lens,
            self._tables[index].transpose(0, 1).contiguous(),
            [self._used_pages[row] for row in rows],
            self.page_tokens,
        )
        self._batch_rows = list(rows)
        return self._batch

    def _end_batch(self) -> None:
        """Writes what the batch has grown back to its rows."""
        if self._batch is None:
            return
        index = torch.tensor(self._batch_rows)
        self._lens[index] = self._batch.lens.transpose(0, 1)
        self._tables[index] = self._batch.tables.transpose(0, 1)
        for row, used in zip(self._batch_rows, self._batch.used, strict=True):
            self._used_pages[row] = used
        self._batch = None

    def _add_rows(self, count: int) -> None:
        first = len(self._slabs)
        self._lens, self._tables = (with_rows(held, count) for held in (self._lens, self._tables))
        self._slabs += [[] for _ in range(count)]
        self._used_pages += [0] * count
        self._free_rows += range(first + count - 1, first - 1, -1)

    def _widen(self, width: int) -> None:
        have = self._tables.shape[-1]
        if width <= have:
            return
        # Steps of a quarter: each widening copies all tables once.
        self._tables = nn.functional.pad(self._tables, (0, width + width // 4 + 1 - have))

    def _columns(self, tables: Tensor) -> Tensor:
        return torch.arange(tables.shape[-1], device=self.device)


def with_rows(held: Tensor, count: int) -> Tensor:
    """As many rows of zeros behind those that there are."""
    return torch.cat((held, held.new_zeros((count, *held.shape[1:]))))


def check_page_tables(tables: PageTables, rows: list[int]) -> None:
    """Asserts that no page of `rows` is owned twice and that all lie in their request's slabs."""
    owned: set[int] = set()
    for row in rows:
        pages = tables.pages(row).tolist()
        granted = set(pages)
        assert len(granted) == len(pages), "a slab was granted twice"
        needed = -(-tables.lens(row).long() // tables.page_tokens)
        table = tables.tables(row)
        columns = torch.arange(table.shape[-1], device=table.device)
        mine = table[columns < needed[..., None]].tolist()
        assert len(set(mine)) == len(mine), "a page serves two places of one request"
        assert set(mine) <= granted, "a page lies outside the request's slabs"
        assert len(mine) == tables.used_pages(row), "the page counter is wrong"
        assert set(mine) == set(pages[: len(mine)]), "a page was handed out of turn"
        assert not owned & granted, "a page belongs to two requests"
        owned |= granted
