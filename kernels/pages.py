"""Pages: where the entries of each (layer, KV head) of a compressed request lie.

A page holds `page_tokens` entries of one KV head of one layer, keys and values. One KV block of
the engine is L * H pages. Blocks that belong to one compressed request alone are its slabs, and any
page of a slab may serve any (layer, head).
"""

from typing import NamedTuple

import torch
from torch import Tensor


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
        # The last step's batch and its gathered tables: decode batches rarely change.
        self._gathered_rows: list[int] = []
        self._gathered = torch.zeros(0, dtype=torch.int32)

    @property
    def nbytes(self) -> int:
        """Bytes held beside the engine's KV memory."""
        tensors = (self.lens, self.tables, self.pages, self._gathered)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def place(self, lens: Tensor, slabs: list[int]) -> int:
        """Gives a request with `lens` [L, H] entries its pages in `slabs`; returns its row.

        Raises:
            ValueError: the slabs are too few.
        """
        needed = -(-lens.long() // self.page_tokens)
        row = self._free_rows.pop()
        self.lens[row] = lens
        self.num_pages[row] = 0
        self.add_slabs(row, slabs)
        total = int(needed.sum())
        if total > int(self.num_pages[row]):
            self.release(row)
            raise ValueError(f"{total} pages do not fit into {len(slabs)} slabs")
        self._widen(int(needed.max()))
        columns = torch.arange(self.tables.shape[-1])
        owned = columns < needed[..., None]
        first = (needed.view(-1).cumsum(0) - needed.view(-1)).view(needed.shape)
        ordinals = (first[..., None] + columns).clamp_(max=max(total - 1, 0))
        self.tables[row] = torch.where(owned, self.pages[row][ordinals], 0).int()
        self.used_pages[row] = total
        self._gathered_rows = []
        return row

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
        self._gathered_rows = []

    def grow(self, rows: list[int]) -> GrownStep:
        """Adds one entry to every head of the requests at `rows` [R].

        Raises:
            ValueError: a request has no page left; nothing has changed then.
        """
        index = torch.tensor(rows)
        lens = self.lens[index]
        count = len(rows)
        full = (lens % self.page_tokens == 0).view(count, -1)
        wanted = full.sum(dim=1)
        if bool((self.used_pages[index] + wanted > self.num_pages[index]).any()):
            raise ValueError("a compressed request outgrew its slabs")
        column = (lens // self.page_tokens).long()
        if bool(full.any()):
            self._widen(int(column.max()) + 1)
        tables = self._gather(rows, index)
        if bool(full.any()):
            ordinals = self.used_pages[index][:, None] + full.long().cumsum(dim=1) - 1
            r, head = full.nonzero(as_tuple=True)
            fresh = self.pages[index[r], ordinals[r, head]].int()
            layer, kv_head = head // self.heads, head % self.heads
            at = column.view(count, -1)[r, head]
            self.tables[index[r], layer, kv_head, at] = fresh
            tables[layer, r, kv_head, at] = fresh
            self.used_pages[index] += wanted
        page = tables.gather(3, column.permute(1, 0, 2)[..., None])[..., 0].long()
        slots = page * self.page_tokens + (lens % self.page_tokens).permute(1, 0, 2)
        grown = lens + 1
        self.lens[index] = grown
        return GrownStep(
            slots.reshape(self.layers, -1),
            tables.view(self.layers, count * self.heads, -1),
            grown.permute(1, 0, 2).reshape(self.layers, -1),
        )

    def entries(self, row: int, layer: int, head: int) -> Tensor:
        """Slots [len] int64 of one head's entries, in the order they were placed."""
        positions = torch.arange(int(self.lens[row, layer, head]))
        pages = self.tables[row, layer, head].long()[positions // self.page_tokens]
        return pages * self.page_tokens + positions % self.page_tokens

    def _gather(self, rows: list[int], index: Tensor) -> Tensor:
        """Tables [L, R, H, W] of `rows`, kept from step to step."""
        if rows != self._gathered_rows or self._gathered.shape[-1] != self.tables.shape[-1]:
            self._gathered = self.tables[index].permute(1, 0, 2, 3).contiguous()
            self._gathered_rows = list(rows)
        return self._gathered

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
