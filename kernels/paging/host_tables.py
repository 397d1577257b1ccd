"""Page tables in the host's memory."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adakv_serve.kernels.paging.growth import (
    DecodeBatch,
    ExtendedStep,
    GrownStep,
    RowTables,
    extend_row,
    extended,
)
from adakv_serve.kernels.paging.layout import PageLayout
from adakv_serve.kernels.paging.pages import (
    EntryTables,
    PageMoves,
    PageTables,
    columns,
    take_first_pages,
)
from adakv_serve.kernels.paging.slabs import Slabs


class HostTables(PageTables):
    """Page tables of up to `rows` requests on the CPU, which counts their used pages.

    Their memory grows with the requests and with the entries.
    """

    def __init__(
        self,
        layout: PageLayout,
        page_tokens: int,
        rows: int,
        clear: Callable[[Tensor], None] | None = None,
    ) -> None:
        """
        Args:
            clear: called with the page ids [p] of slabs before a request has them.
        """
        self.layout = layout
        self.page_tokens = page_tokens
        self._slabs = Slabs(layout, rows)
        self._entries = EntryTables(layout, self._slabs.rows)
        self._used_pages = [0] * self._slabs.rows
        self._clear = clear
        # Decode batches rarely change from step to step. While one lasts it holds its rows' truth.
        self._batch: DecodeBatch | None = None
        self._batch_rows: list[int] = []

    @property
    def nbytes(self) -> int:
        return self._entries.nbytes + (0 if self._batch is None else self._batch.nbytes)

    def lens(self, row: int) -> Tensor:
        self._end_batch()
        return self._entries.lens[row]

    def tables(self, row: int) -> Tensor:
        self._end_batch()
        return self._entries.pages[row]

    def pages(self, row: int) -> Tensor:
        return self._slabs.pages(row)

    def used_pages(self, row: int) -> int:
        self._end_batch()
        return self._used_pages[row]

    def open(self, slabs: list[int]) -> int:
        row, rows = self._slabs.open(slabs), self._slabs.rows
        self._grant(slabs)
        if rows > len(self._used_pages):
            self._entries.add_rows(rows)
            self._used_pages += [0] * (rows - len(self._used_pages))
        return row

    def place_layers(self, row: int, layers: list[int], lens: Tensor) -> Tensor:
        self._end_batch()
        needed = self.pages_for(lens)
        start = self._used_pages[row]
        end = start + int(needed.sum())
        self._slabs.check_fit(row, end)
        self._entries.widen(int(needed.max()))
        # `nonzero` goes by layer, head and column: the order in which pages are used.
        owned = columns(self._entries.pages) < needed[..., None]
        k, head, column = owned.nonzero(as_tuple=True)
        tables = torch.zeros(owned.shape, dtype=torch.int32)
        tables[k, head, column] = self.pages(row)[start:end].int()
        index = torch.tensor(layers)
        self._entries.pages[row, index] = tables
        self._entries.lens[row, index] = lens
        self._used_pages[row] = end
        return tables

    def add_slabs(self, row: int, slabs: list[int]) -> None:
        self._slabs.extend(row, slabs)
        self._grant(slabs)

    def _grant(self, slabs: list[int]) -> None:
        if self._clear is not None and slabs:
            self._clear(self.layout.slab_pages(torch.tensor(slabs)))

    def shrink(self, row: int, lens: Tensor, slabs: int) -> PageMoves:
        self._end_batch()
        needed = self.pages_for(lens)
        used = int(needed.sum())
        self._slabs.check_shrunk_fit(used, slabs)
        moves = take_first_pages(self._entries.pages[row], needed, self.pages(row))
        self._entries.lens[row] = lens
        self._used_pages[row] = used
        self._slabs.truncate(row, slabs)
        return moves

    def release(self, row: int) -> None:
        self._end_batch()
        self._entries.lens[row] = 0
        self._used_pages[row] = 0
        self._slabs.close(row)

    def fits_graphs(self, rows: list[int]) -> bool:
        """Return False: CPUs have no graphs."""
        return False

    def share_longest(self, rows: list[int], most: Callable[[Tensor], Tensor]) -> None:
        """Do nothing: without graphs ranks need not agree on lengths."""

    def grow(self, rows: list[int], graph_rows: int | None = None) -> GrownStep:
        """Add one entry to every head of the requests at `rows` [R].

        Raises:
            ValueError: a request has no page left; nothing has changed then.
        """
        assert graph_rows is None, "CPUs have no graphs"
        batch = self._batch
        if batch is None or rows != self._batch_rows or not batch.is_wide_enough:
            batch = self._begin_batch(rows)
        return batch.grow(lambda request, ordinal: self._slabs.page(rows[request], ordinal))

    def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> ExtendedStep:
        self._end_batch()
        lens = self._entries.lens
        for row, count in zip(rows, tokens, strict=True):
            self._slabs.check_fit(row, int(self.pages_for(lens[row] + count).sum()))
        longest = max(int(lens[row].max()) + count for row, count in zip(rows, tokens, strict=True))
        # Rounded up twice: see `extend_row`.
        self._entries.widen(longest // self.page_tokens + 2)
        tables, slots = [], []
        for row, count in zip(rows, tokens, strict=True):
            used = torch.tensor([self._used_pages[row]])
            pages = self._entries.pages[row]
            table = RowTables(lens[row], pages, used, self.pages(row))
            slots.append(extend_row(table, count, self.page_tokens))
            self._used_pages[row] = int(used)
            tables.append(table)
        return extended(slots, tables)

    def _begin_batch(self, rows: list[int]) -> DecodeBatch:
        self._end_batch()
        index = torch.tensor(rows)
        lens = self._entries.lens[index].transpose(0, 1).contiguous()
        self._entries.widen(int(lens.max()) // self.page_tokens + 1)
        self._batch = DecodeBatch(
            lens,
            self._entries.pages[index].transpose(0, 1).contiguous(),
            [self._used_pages[row] for row in rows],
            self.page_tokens,
        )
        self._batch_rows = list(rows)
        return self._batch

    def _end_batch(self) -> None:
        """Write the batch's growth back to its rows."""
        if self._batch is None:
            return
        index = torch.tensor(self._batch_rows)
        self._entries.lens[index] = self._batch.lens.transpose(0, 1)
        self._entries.pages[index] = self._batch.tables.transpose(0, 1)
        for row, used in zip(self._batch_rows, self._batch.used, strict=True):
            self._used_pages[row] = used
        self._batch = None
