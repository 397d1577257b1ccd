"""Slabs: the KV blocks that compressed requests own, whose pages they use in order."""

from torch import Tensor

from adakv_serve.kernels.paging.layout import PageLayout
from adakv_serve.kernels.transfer import sent

# Rows at the start; they double from there.
_FIRST_ROWS = 2


class Slabs:
    """The slabs of up to `most_rows` requests, each of which has a row.

    A request takes its pages in the order of its slabs, and always the first ones are in use. So a
    counter of used pages for each request, which the page tables hold, completes this allocator.
    """

    def __init__(self, layout: PageLayout, most_rows: int) -> None:
        self._layout = layout
        self._most_rows = most_rows
        rows = min(most_rows, _FIRST_ROWS)
        self._slabs: list[list[int]] = [[] for _ in range(rows)]
        self._free_rows = list(range(rows - 1, -1, -1))
        self._offsets: list[int] = layout.offsets.flatten().tolist()

    @property
    def rows(self) -> int:
        """Rows that there are, free ones included."""
        return len(self._slabs)

    def open(self, slabs: list[int]) -> int:
        """Give a request slabs and return its row; `rows` may grow."""
        if not self._free_rows:
            first = self.rows
            count = min(first, self._most_rows - first)
            self._slabs += [[] for _ in range(count)]
            self._free_rows += range(first + count - 1, first - 1, -1)
        row = self._free_rows.pop()
        self._slabs[row] = list(slabs)
        return row

    def close(self, row: int) -> None:
        """Take a request's slabs and its row."""
        self._slabs[row] = []
        self._free_rows.append(row)

    def extend(self, row: int, slabs: list[int]) -> None:
        """Append slabs to a request's own."""
        self._slabs[row] += slabs

    def truncate(self, row: int, count: int) -> None:
        """Leave a request its first slabs."""
        self._slabs[row] = self._slabs[row][:count]

    def __getitem__(self, row: int) -> list[int]:
        """A request's slabs."""
        return self._slabs[row]

    def pages(self, row: int) -> Tensor:
        """Return all page ids [slabs * L * H] of a request in the order of use."""
        return self._layout.slab_pages(sent(self._slabs[row], self._layout.offsets.device))

    def page(self, row: int, ordinal: int) -> int | None:
        """Return the id of a request's page number `ordinal`, or None beyond its slabs."""
        slab, page = divmod(ordinal, len(self._offsets))
        if slab >= len(self._slabs[row]):
            return None
        return self._slabs[row][slab] * self._layout.block_stride + self._offsets[page]

    def check_fit(self, row: int, pages: int) -> None:
        """Raise ValueError if a request's slabs have fewer pages."""
        granted = len(self._slabs[row]) * len(self._offsets)
        if pages > granted:
            raise ValueError(f"{pages} pages do not fit into {granted}")

    def check_shrunk_fit(self, pages: int, slabs: int) -> None:
        """Raise ValueError if so many slabs have fewer pages."""
        if pages > slabs * len(self._offsets):
            raise ValueError(f"{pages} pages do not fit into {slabs} slabs")
