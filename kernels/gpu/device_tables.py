"""Page tables on the GPU: no step of an unchanged decode batch waits for it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from adakv_serve.kernels.gpu.tables import grow_by_one, place_pages
from adakv_serve.kernels.paging.growth import (
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
    take_first_pages,
    with_rows,
)
from adakv_serve.kernels.paging.slabs import Slabs
from adakv_serve.kernels.transfer import sent


class _Batch(NamedTuple):
    """R requests that decode together.

    lens, tables, used, slots: the arguments of `grow_by_one`.
    longest: entries of the longest head when the batch began.
    fixed: whether the batch lies where graphs read.
    """

    rows: Tensor
    lens: Tensor
    tables: Tensor
    used: Tensor
    slots: Tensor | None
    longest: int
    fixed: bool

    @property
    def nbytes(self) -> int:
        held = (self.used,) if self.fixed else (self.lens, self.tables, self.used)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)


class _Fixed(NamedTuple):
    """Memory for the batches of CUDA graphs, at the addresses that they have captured.

    A batch takes the first part, densely: lens and slots [L * R * H], tables [L * R * H * W].
    """

    lens: Tensor
    tables: Tensor
    slots: Tensor
    columns: int

    @staticmethod
    def make(sequences: int, columns: int, device: torch.device) -> "_Fixed":
        return _Fixed(
            torch.ones(sequences, dtype=torch.int32, device=device),
            torch.zeros(sequences * columns, dtype=torch.int32, device=device),
            torch.full((sequences,), -1, dtype=torch.int64, device=device),
            columns,
        )

    @property
    def nbytes(self) -> int:
        held = (self.lens, self.tables, self.slots)
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def batch(self, layers: int, requests: int, heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return lens, tables, slots of a batch whose rows attend to one entry and store none."""
        sequences = layers * requests * heads
        lens = self.lens[:sequences].view(layers, requests, heads).fill_(1)
        tables = self.tables[: sequences * self.columns].view(layers, requests, heads, -1)
        # Any page will do: these rows' results are dropped.
        tables[..., 0] = 0
        return lens, tables, self.slots[:sequences].view(layers, -1).fill_(-1)


class DeviceTables(PageTables):
    """Page tables of up to `rows` requests with everything that decoding needs on the device.

    The host has the slabs and an upper bound on the longest head. Only the device has the number of
    used pages: reading it, placing and shrinking wait for the device.

    With `graph_columns`, batches of at most `graph_rows` requests whose heads fit so many pages may
    grow where CUDA graphs read.
    """

    def __init__(
        self,
        layout: PageLayout,
        page_tokens: int,
        rows: int,
        graph_columns: int = 0,
        graph_rows: int | None = None,
    ) -> None:
        self.layout = layout
        self.page_tokens = page_tokens
        sequences = (rows if graph_rows is None else graph_rows) * layout.offsets.numel()
        self._fixed = _Fixed.make(sequences, graph_columns, self.device) if graph_columns else None
        self._slabs = Slabs(layout, rows)
        rows = self._slabs.rows
        self._entries = EntryTables(layout, rows)
        self._used = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self._granted = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self._slab_ids = torch.zeros((rows, 1), dtype=torch.int32, device=self.device)
        # Slabs that `_granted` and `_slab_ids` do not include yet: row, place, block.
        self._unsent: list[tuple[int, int, int]] = []
        self._longest = [0] * rows
        # While a batch lasts it holds its rows' truth.
        self._batch: _Batch | None = None
        self._batch_rows: list[int] = []
        self._steps = 0

    @property
    def nbytes(self) -> int:
        own = self._used.nbytes + self._granted.nbytes + self._slab_ids.nbytes
        batches = [held.nbytes for held in (self._batch, self._fixed) if held is not None]
        return self._entries.nbytes + own + sum(batches)

    def lens(self, row: int) -> Tensor:
        self._end_batch()
        return self._entries.lens[row]

    def tables(self, row: int) -> Tensor:
        self._end_batch()
        return self._entries.pages[row]

    def pages(self, row: int) -> Tensor:
        return self._slabs.pages(row)

    def longest(self, row: int) -> int:
        """Return an upper bound on the entries of a request's longest head, without waiting."""
        growing = self._batch is not None and row in self._batch_rows
        return self._longest[row] + (self._steps if growing else 0)

    def share_longest(self, rows: list[int], most: Callable[[Tensor], Tensor]) -> None:
        longest = most(torch.tensor([self.longest(row) for row in rows])).tolist()
        for row, entries in zip(rows, longest, strict=True):
            self._longest[row] += max(0, entries - self.longest(row))

    def fits_graphs(self, rows: list[int]) -> bool:
        if self._fixed is None:
            return False
        room = self._fixed.columns * self.page_tokens
        return all(self.longest(row) < room for row in rows)

    def used_pages(self, row: int) -> int:
        self._end_batch()
        return int(self._used[row])

    def open(self, slabs: list[int]) -> int:
        row, rows = self._slabs.open(slabs), self._slabs.rows
        if rows > len(self._longest):
            self._entries.add_rows(rows)
            self._used, self._granted, self._slab_ids = (
                with_rows(held, rows) for held in (self._used, self._granted, self._slab_ids)
            )
            self._longest += [0] * (rows - len(self._longest))
        self._note_unsent(row, 0, slabs)
        return row

    def add_slabs(self, row: int, slabs: list[int]) -> None:
        self._note_unsent(row, len(self._slabs[row]), slabs)
        self._slabs.extend(row, slabs)

    def place_layers(self, row: int, layers: list[int], lens: Tensor) -> Tensor:
        self._end_batch()
        lens = lens.to(self.device)
        # In one piece: each read waits for the device.
        *counts, start = torch.cat((lens.flatten(), self._used[row : row + 1])).tolist()
        on_host = torch.tensor(counts, dtype=torch.int64).view(lens.shape)
        needed = self.pages_for(on_host)
        self._slabs.check_fit(row, start + int(needed.sum()))
        self._entries.widen(int(needed.max()))
        self._send_slabs()
        tables = place_pages(
            lens, self._slab_ids[row], self._used[row : row + 1], self.layout, self.page_tokens,
            self._entries.pages.shape[-1],
        ).clamp_(min=0)  # fmt: skip
        index = sent(layers, self.device)
        self._entries.pages[row, index] = tables
        self._entries.lens[row, index] = lens
        self._longest[row] = max(self._longest[row], int(on_host.max()))
        return tables

    def shrink(self, row: int, lens: Tensor, slabs: int) -> PageMoves:
        self._end_batch()
        needed = self.pages_for(lens)
        used = int(needed.sum())
        self._slabs.check_shrunk_fit(used, slabs)
        moves = take_first_pages(self._entries.pages[row], needed, self.pages(row))
        self._entries.lens[row] = lens
        self._used[row] = used
        self._slabs.truncate(row, slabs)
        self._granted[row] = slabs
        self._unsent = [one for one in self._unsent if one[0] != row or one[1] < slabs]
        self._longest[row] = int(lens.max())
        return moves

    def release(self, row: int) -> None:
        self._end_batch()
        self._entries.lens[row] = 0
        self._used[row] = 0
        self._slabs.close(row)
        self._granted[row] = 0
        self._unsent = [one for one in self._unsent if one[0] != row]
        self._longest[row] = 0

    def grow(self, rows: list[int], graph_rows: int | None = None) -> GrownStep:
        """Add one entry to every head of the requests at `rows` [R].

        A head without a page left gets the slot -1, which cache writes leave out.

        Args:
            graph_rows: N >= R rows of a CUDA graph. Those after the first R have the slot -1 and
                one entry each, in any page.
        """
        batch = self._batch
        if batch is None or rows != self._batch_rows or not self._goes_on(batch, graph_rows):
            batch = self._begin_batch(rows, graph_rows)
        self._send_slabs()
        slots = grow_by_one(
            batch.lens, batch.tables, batch.used, self._slab_ids[batch.rows],
            self._granted[batch.rows], self.layout, self.page_tokens, batch.slots,
        )  # fmt: skip
        self._steps += 1
        layers = self.layers
        return GrownStep(
            slots, batch.tables.view(layers, -1, batch.tables.shape[-1]),
            batch.lens.view(layers, -1), self._steps - 1,
        )  # fmt: skip

    def extend(self, rows: Sequence[int], tokens: Sequence[int]) -> ExtendedStep:
        """Add `tokens` [R] entries to every head of the requests at `rows` [R].

        Entries of a head without pages left get the slot -1, which cache writes leave out.
        """
        self._end_batch()
        counts = list(zip(rows, tokens, strict=True))
        longest = max(self._longest[row] + count for row, count in counts)
        # Rounded up twice: see `extend_row`.
        self._entries.widen(longest // self.page_tokens + 2)
        tables, slots = [], []
        for row, count in counts:
            used, order = self._used[row : row + 1], self.pages(row)
            table = RowTables(self._entries.lens[row], self._entries.pages[row], used, order)
            slots.append(extend_row(table, count, self.page_tokens))
            self._longest[row] += count
            tables.append(table)
        return extended(slots, tables)

    def _goes_on(self, batch: _Batch, graph_rows: int | None) -> bool:
        if graph_rows is not None:
            return batch.fixed and batch.lens.shape[1] == graph_rows
        room = batch.tables.shape[-1] * self.page_tokens
        return not batch.fixed and batch.longest + self._steps < room

    def _begin_batch(self, rows: list[int], graph_rows: int | None) -> _Batch:
        self._end_batch()
        index = sent(rows, self.device)
        longest = max((self._longest[row] for row in rows), default=0)
        self._entries.widen(longest // self.page_tokens + 1)
        lens, tables = (
            held[index].transpose(0, 1) for held in (self._entries.lens, self._entries.pages)
        )
        slots = None
        if graph_rows is None:
            lens, tables = lens.contiguous(), tables.contiguous()
        else:
            assert self._fixed is not None
            layers, heads = self.layout.offsets.shape
            into, into_tables, slots = self._fixed.batch(layers, graph_rows, heads)
            into[:, : len(rows)] = lens
            columns = min(tables.shape[-1], self._fixed.columns)
            into_tables[:, : len(rows), :, :columns] = tables[..., :columns]
            lens, tables = into, into_tables
        self._batch = _Batch(
            index, lens, tables, self._used[index], slots, longest, graph_rows is not None
        )
        self._batch_rows, self._steps = list(rows), 0
        return self._batch

    def _end_batch(self) -> None:
        batch, self._batch = self._batch, None
        # A batch without requests may have taken any number of steps.
        if batch is None or not self._batch_rows:
            return
        for row in self._batch_rows:
            self._longest[row] += self._steps
        self._entries.widen(-(-(batch.longest + self._steps) // self.page_tokens))
        count, columns = len(batch.rows), min(batch.tables.shape[-1], self._entries.pages.shape[-1])
        self._entries.lens[batch.rows] = batch.lens[:, :count].transpose(0, 1)
        tables = batch.tables[:, :count, :, :columns].transpose(0, 1)
        self._entries.pages[batch.rows, ..., :columns] = tables
        self._used[batch.rows] = batch.used

    def _note_unsent(self, row: int, first: int, slabs: Sequence[int]) -> None:
        self._unsent += [(row, first + place, slab) for place, slab in enumerate(slabs)]

    def _send_slabs(self) -> None:
        """Bring `_slab_ids` and `_granted` up to date without waiting for the device."""
        if not self._unsent:
            return
        missing = max(place for _, place, _ in self._unsent) + 1 - self._slab_ids.shape[1]
        if missing > 0:
            spare = missing + self._slab_ids.shape[1] // 4
            self._slab_ids = nn.functional.pad(self._slab_ids, (0, spare))
        rows, places, slabs = sent(self._unsent, self.device).unbind(dim=1)
        self._slab_ids[rows, places] = slabs.int()
        changed = sorted({row for row, _, _ in self._unsent})
        counts = sent([len(self._slabs[row]) for row in changed], self.device)
        self._granted[sent(changed, self.device)] = counts.int()
        self._unsent.clear()
