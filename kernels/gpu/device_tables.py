"""Page tables that grow on the device: no step of an unchanged decode batch waits for it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kernels.gpu.tables import grow_by_one, place_pages
from kernels.paging.growth import GrownStep
from kernels.paging.pages import PageLayout, PageTables, with_rows
from kernels.transfer import sent


class _Batch(NamedTuple):
    """R requests that decode together.

    lens, tables, used, slots: as `grow_by_one` takes them.
    longest: entries of the longest head, when it began.
    fixed: whether it lies where graphs look for it.
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
    """Memory for the batches of CUDA graphs, which find it where it was when they were captured.

    A batch takes the first of it, densely: lens and slots [L * R * H], tables [L * R * H * W].
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
        """Lens, tables and slots of a batch whose rows all attend to one entry, and store none."""
        sequences = layers * requests * heads
        lens = self.lens[:sequences].view(layers, requests, heads).fill_(1)
        tables = self.tables[: sequences * self.columns].view(layers, requests, heads, -1)
        # Of whatever is there: nobody looks at what comes of it.
        tables[..., 0] = 0
        return lens, tables, self.slots[:sequences].view(layers, -1).fill_(-1)


class DeviceTables(PageTables):
    """What `PageTables` are, with everything that decoding needs on the layout's device.

    The host keeps what follows without looking: slabs, and how long the longest head can be. What a
    request has used of its slabs only the device knows; asking, placing and shrinking wait for it.

    With `graph_columns`, batches of heads that are no longer than so many pages may grow where CUDA
    graphs look for them, which are of at most `graph_rows` requests.
    """

    def __init__(
        self,
        layout: PageLayout,
        page_tokens: int,
        rows: int,
        graph_columns: int = 0,
        graph_rows: int | None = None,
    ) -> None:
        super().__init__(layout, page_tokens, rows)
        sequences = (rows if graph_rows is None else graph_rows) * layout.offsets.numel()
        rows = len(self._slabs)
        self._fixed = _Fixed.make(sequences, graph_columns, self.device) if graph_columns else None
        self._used = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self._granted = torch.zeros(rows, dtype=torch.int32, device=self.device)
        self._slab_ids = torch.zeros((rows, 1), dtype=torch.int32, device=self.device)
        # Slabs that the device does not know of yet: row, place, block.
        self._news: list[tuple[int, int, int]] = []
        self._longest = [0] * rows
        self._growing: _Batch | None = None
        self._steps = 0

    @property
    def nbytes(self) -> int:
        held = (self._used, self._granted, self._slab_ids)
        mine = sum(tensor.numel() * tensor.element_size() for tensor in held)
        others = [held.nbytes for held in (self._growing, self._fixed) if held is not None]
        return super().nbytes + mine + sum(others)

    def longest(self, row: int) -> int:
        """Entries of a request's longest head, or more, as far as the host knows."""
        growing = self._growing is not None and row in self._batch_rows
        return self._longest[row] + (self._steps if growing else 0)

    def share_longest(self, rows: list[int], most: Callable[[Tensor], Tensor]) -> None:
        """Account for the heads of other ranks, so that all ranks replay a graph or none does.

        Args:
            most: returns each number's maximum over all ranks.
        """
        longest = most(torch.tensor([self.longest(row) for row in rows])).tolist()
        for row, entries in zip(rows, longest, strict=True):
            self._longest[row] += max(0, entries - self.longest(row))

    def fits_graphs(self, rows: list[int]) -> bool:
        """Whether these requests can take one more entry where graphs look for it."""
        if self._fixed is None:
            return False
        room = self._fixed.columns * self.page_tokens
        return all(self.longest(row) < room for row in rows)

    def used_pages(self, row: int) -> int:
        self._end_batch()
        return int(self._used[row])

    def open(self, slabs: list[int]) -> int:
        row = super().open(slabs)
        self._tell(row, 0, slabs)
        return row

    def add_slabs(self, row: int, slabs: list[int]) -> None:
        self._tell(row, len(self._slabs[row]), slabs)
        super().add_slabs(row, slabs)

    def place_layers(self, row: int, layers: list[int], lens: Tensor) -> Tensor:
        self._end_batch()
        lens = lens.to(self.device)
        # In one piece: each question waits for all that the device has been told to do.
        *told, start = torch.cat((lens.flatten(), self._used[row : row + 1])).tolist()
        on_host = torch.tensor(told, dtype=torch.int64).view(lens.shape)
        needed = -(-on_host // self.page_tokens)
        end, granted = start + int(needed.sum()), len(self._slabs[row]) * len(self._offsets)
        if end > granted:
            raise ValueError(f"{end} pages do not fit into {granted}")
        self._widen(int(needed.max()))
        self._send_news()
        tables = place_pages(
            lens, self._slab_ids[row], self._used[row : row + 1], self.layout, self.page_tokens,
            self._tables.shape[-1],
        ).clamp_(min=0)  # fmt: skip
        index = sent(layers, self.device)
        self._tables[row, index] = tables
        self._lens[row, index] = lens
        self._longest[row] = max(self._longest[row], int(on_host.max()))
        return tables

    def shrink(self, row: int, lens: Tensor, slabs: int) -> tuple[Tensor, Tensor]:
        moves = super().shrink(row, lens, slabs)
        self._used[row] = self._used_pages[row]
        self._granted[row] = slabs
        self._news = [news for news in self._news if news[0] != row or news[1] < slabs]
        self._longest[row] = int(lens.max())
        return moves

    def release(self, row: int) -> None:
        super().release(row)
        self._used[row] = 0
        self._granted[row] = 0
        self._news = [news for news in self._news if news[0] != row]
        self._longest[row] = 0

    def grow(self, rows: list[int], graph_rows: int | None = None) -> GrownStep:
        """Adds one entry to every head of the requests at `rows` [R].

        A head without a page left gets the slot -1, which cache writes leave out.

        Args:
            graph_rows: N >= R; the step is of N rows then, where graphs look for it. Those after
                the first R have the slot -1 and one entry each, of whatever is there.
        """
        batch = self._growing
        if batch is None or rows != self._batch_rows or not self._goes_on(batch, graph_rows):
            batch = self._begin(rows, graph_rows)
        self._send_news()
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

    def _goes_on(self, batch: _Batch, graph_rows: int | None) -> bool:
        if graph_rows is not None:
            return batch.fixed and batch.lens.shape[1] == graph_rows
        room = batch.tables.shape[-1] * self.page_tokens
        return not batch.fixed and batch.longest + self._steps < room

    def _begin(self, rows: list[int], graph_rows: int | None) -> _Batch:
        self._end_batch()
        index = sent(rows, self.device)
        longest = max((self._longest[row] for row in rows), default=0)
        self._widen(longest // self.page_tokens + 1)
        lens, tables = (held[index].transpose(0, 1) for held in (self._lens, self._tables))
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
        self._growing = _Batch(
            index, lens, tables, self._used[index], slots, longest, graph_rows is not None
        )
        self._batch_rows, self._steps = list(rows), 0
        return self._growing

    def _end_batch(self) -> None:
        batch, self._growing = self._growing, None
        # One of nobody may have gone on for as long as it likes.
        if batch is None or not self._batch_rows:
            return
        for row in self._batch_rows:
            self._longest[row] += self._steps
        self._widen(-(-(batch.longest + self._steps) // self.page_tokens))
        count, columns = len(batch.rows), min(batch.tables.shape[-1], self._tables.shape[-1])
        self._lens[batch.rows] = batch.lens[:, :count].transpose(0, 1)
        self._tables[batch.rows, ..., :columns] = batch.tables[:, :count, :, :columns].transpose(
            0, 1
        )
        self._used[batch.rows] = batch.used

    def _add_rows(self, count: int) -> None:
        super()._add_rows(count)
        self._used, self._granted, self._slab_ids = (
            with_rows(held, count) for held in (self._used, self._granted, self._slab_ids)
        )
        self._longest += [0] * count

    def _tell(self, row: int, first: int, slabs: Sequence[int]) -> None:
        self._news += [(row, first + place, slab) for place, slab in enumerate(slabs)]

    def _send_news(self) -> None:
        if not self._news:
            return
        missing = max(place for _, place, _ in self._news) + 1 - self._slab_ids.shape[1]
        if missing > 0:
            spare = missing + self._slab_ids.shape[1] // 4
            self._slab_ids = nn.functional.pad(self._slab_ids, (0, spare))
        rows, places, slabs = sent(self._news, self.device).unbind(dim=1)
        self._slab_ids[rows, places] = slabs.int()
        told = sorted({row for row, _, _ in self._news})
        counts = sent([len(self._slabs[row]) for row in told], self.device)
        self._granted[sent(told, self.device)] = counts.int()
        self._news.clear()
