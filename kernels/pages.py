"""Pages: where the entries of each (layer, KV head) of a compressed request lie.

A page holds `page_tokens` entries of one KV head of one layer, keys and values. One KV block of
the engine is L * H pages. Blocks that belong to one compressed request alone are its slabs, and any
page of a slab may serve any (layer, head).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.growth import grow_tables


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

    @property
    def pages_per_block(self) -> int:
        return self.offsets.numel()

    def block_pages(self, blocks: Tensor, layer: int) -> Tensor:
        """Page ids [nb, H] of uncompressed blocks [nb] in `layer`."""
        return blocks[:, None] * self.block_stride + self.offsets[layer]

    def slab_pages(self, slabs: Tensor) -> Tensor:
        """Page ids [num_slabs * L * H] of slabs [num_slabs], in the order they are handed out."""
        return (slabs[:, None] * self.block_stride + self.offsets.view(-1)).view(-1)


class GrownStep(NamedTuple):
    """One more entry for every head of R requests. Order of sequences: request, then head.

    slots: [L, R * H] int64, page id * page_tokens + offset of the new entry.
    tables: [L, R * H, W] int32 page ids.
    lens: [L, R * H] int32 entries, the new one included.
    """

    slots: Tensor
    tables: Tensor
    lens: Tensor


@dataclass
class _Batch:
    """A decode batch's part of the tables, in the order of attention.

    lens: [L, R, H]. tables: [L, R, H, W]. steps_left: entries that surely fit into W columns.
    """

    rows: list[int]
    index: Tensor
    lens: Tensor
    tables: Tensor
    steps_left: int


class PageTables:
    """Page tables of up to `rows` compressed requests; grows in width with what they hold.

    Pages of a request are handed out in the order of its slabs and are never given back one by one,
    so that a counter is the whole allocator.
    """

    def __init__(self, layout: PageLayout, page_tokens: int, rows: int) -> None:
        self.layout = layout
        self.page_tokens = page_tokens
        self.layers, self.heads = layout.offsets.shape
        self.lens = torch.zeros((rows, self.layers, self.heads), dtype=torch.int32)
        self.tables = torch.zeros((rows, self.layers, self.heads, 1), dtype=torch.int32)
        self.pages = torch.zeros((rows, 0), dtype=torch.int64)
        self.num_pages = torch.zeros(rows, dtype=torch.int64)
        self.used_pages = torch.zeros(rows, dtype=torch.int64)
        self._free_rows = list(range(rows - 1, -1, -1))
        # Decode batches rarely change from step to step.
        self._batch: _Batch | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held beside the engine's KV memory."""
        tensors = [self.lens, self.tables, self.pages]
        if self._batch is not None:
            tensors += [self._batch.lens, self._batch.tables]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def open(self, slabs: list[int]) -> int:
        """Gives a request without entries the pages of its slabs; returns its row."""
        row = self._free_rows.pop()
        self._batch = None
        self.add_slabs(row, slabs)
        return row

    def place(self, lens: Tensor, slabs: list[int]) -> int:
        """`open` and `place_layer` for lens [L, H] of all layers.

        Raises:
            ValueError: the slabs are too few; nothing has changed then.
        """
        row = self.open(slabs)
        try:
            for layer, layer_lens in enumerate(lens):
                self.place_layer(row, layer, layer_lens)
        except ValueError:
            self.release(row)
            raise
        return row

    def place_layer(self, row: int, layer: int, lens: Tensor) -> Tensor:
        """Gives the heads of a layer pages for `lens` [H] entries; returns their tables [H, W].

        Raises:
            ValueError: the slabs are too few.
        """
        needed = -(-lens.long() // self.page_tokens)
        ends = needed.cumsum(0)
        used, total, widest = int(self.used_pages[row]), int(ends[-1]), int(needed.max())
        if used + total > int(self.num_pages[row]):
            raise ValueError(f"{used + total} pages do not fit into {int(self.num_pages[row])}")
        self._widen(widest)
        columns = torch.arange(widest)
        ordinals = (ends - needed)[:, None] + columns
        owned = columns < needed[:, None]
        table = self.tables[row, layer]
        table[:, :widest][owned] = self.pages[row, used : used + total][ordinals[owned]].int()
        self.lens[row, layer] = lens
        self.used_pages[row] = used + total
        return table

    def add_slabs(self, row: int, slabs: list[int]) -> None:
        """Appends blocks that the scheduler granted for growth."""
        start = int(self.num_pages[row])
        fresh = self.layout.slab_pages(torch.tensor(slabs, dtype=torch.int64))
        end = start + fresh.numel()
        if end > self.pages.shape[1]:
            wider = torch.zeros((self.pages.shape[0], 2 * end), dtype=torch.int64)
            wider[:, : self.pages.shape[1]] = self.pages
            self.pages = wider
        self.pages[row, start:end] = fresh
        self.num_pages[row] = end

    def release(self, row: int) -> None:
        self.lens[row] = 0
        self.num_pages[row] = 0
        self.used_pages[row] = 0
        self._free_rows.append(row)
        self._batch = None

    def grow(self, rows: list[int]) -> GrownStep:
        """Adds one entry to every head of the requests at `rows` [R].

        Raises:
            ValueError: a request has no page left; nothing has changed then.
        """
        batch = self._gather(rows)
        index = batch.index
        used = self.used_pages[index]
        growth = grow_tables(
            batch.lens,
            batch.tables,
            self.pages[index],
            used,
            self.num_pages[index],
            self.page_tokens,
        )
        if growth.fresh.shape[0]:
            request, layer, head, column = growth.fresh.unbind(1)
            fresh = batch.tables[layer, request, head, column]
            self.tables[index[request], layer, head, column] = fresh
            self.used_pages[index] = used
        self.lens[index] = batch.lens.transpose(0, 1)
        batch.steps_left -= 1
        return GrownStep(
            growth.slots.view(self.layers, -1),
            batch.tables.view(self.layers, len(rows) * self.heads, -1),
            batch.lens.view(self.layers, -1),
        )

    def entries(self, row: int, layer: int, head: int) -> Tensor:
        """Slots [len] int64 of one head's entries, in the order they were placed."""
        positions = torch.arange(int(self.lens[row, layer, head]))
        pages = self.tables[row, layer, head].long()[positions // self.page_tokens]
        return pages * self.page_tokens + positions % self.page_tokens

    def _gather(self, rows: list[int]) -> "_Batch":
        """The batch of `rows`, kept from step to step, wide enough for one more entry."""
        batch = self._batch
        if batch is not None and batch.rows == rows and batch.steps_left > 0:
            return batch
        index = torch.tensor(rows)
        lens = self.lens[index].transpose(0, 1).contiguous()
        longest = int(lens.max())
        self._widen(longest // self.page_tokens + 1)
        tables = self.tables[index].transpose(0, 1).contiguous()
        room = self.tables.shape[-1] * self.page_tokens - longest
        self._batch = _Batch(list(rows), index, lens, tables, room)
        return self._batch

    def _widen(self, width: int) -> None:
        have = self.tables.shape[-1]
        if width <= have:
            return
        # Steps of a quarter: each widening copies all tables once.
        wider = torch.zeros((*self.tables.shape[:-1], width + width // 4 + 1), dtype=torch.int32)
        wider[..., :have] = self.tables
        self.tables = wider


def check_page_tables(tables: PageTables, rows: list[int]) -> None:
    """Asserts that no page of `rows` is owned twice and that all lie in their request's slabs."""
    owned: set[int] = set()
    for row in rows:
        granted = set(tables.pages[row, : int(tables.num_pages[row])].tolist())
        assert len(granted) == int(tables.num_pages[row]), "a slab was granted twice"
        needed = -(-tables.lens[row].long() // tables.page_tokens)
        columns = torch.arange(tables.tables.shape[-1])
        pages = tables.tables[row][columns < needed[..., None]].tolist()
        assert len(set(pages)) == len(pages), "a page serves two places of one request"
        assert set(pages) <= granted, "a page lies outside the request's slabs"
        assert len(pages) == int(tables.used_pages[row]), "the page counter is wrong"
        assert not owned & granted, "a page belongs to two requests"
        owned |= granted
