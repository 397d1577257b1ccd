"""Compressed caches without a request: in pages, or copied to the host's memory."""

import mmap
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from adakv_serve.kernels.paging.paged_cache import PagedCache, move_pages, read_pages, write_pages
from adakv_serve.kernels.paging.pages import PageTables
from adakv_worker.session_messages import HeldCard, Hold
from adakv_worker.worker.packed_state import CompressedState

# Returns memory for the keys and values of a number of pages.
Room = Callable[[int], tuple[Tensor, Tensor]]


def copied(cache: PagedCache, tables: PageTables, row: int, room: Room) -> CompressedState:
    """Copy the entries of a request at `row` out, without its window."""
    pages = tables.filled_pages(row)
    keys, values = room(len(pages))
    read_pages(cache, pages, keys, values)
    return CompressedState(tables.lens(row).to("cpu", copy=True), keys, values, None)


def placed(cache: PagedCache, tables: PageTables, state: CompressedState, slabs: list[int]) -> int:
    """Place copied entries in `slabs`; return their row.

    Raises:
        ValueError: the slabs are too few; nothing has changed then.
    """
    row = tables.place(state.lens, slabs)
    write_pages(cache, tables.filled_pages(row), state.keys, state.values)
    return row


def memory_on(device: torch.device, cache: PagedCache) -> Room:
    """Return what takes fresh memory on a device."""

    def room(pages: int) -> tuple[Tensor, Tensor]:
        shape, dtype = (pages, cache.keys[0].numel()), cache.keys.dtype
        return (
            torch.empty(shape, dtype=dtype, device=device),
            torch.empty(shape, dtype=dtype, device=device),
        )

    return room


def host_memory(cache: PagedCache) -> Room:
    """Return what takes memory of the host that goes back to the system once it is freed.

    Caches differ in size. In the heap each would leave a hole that the next one does not fit: an
    engine that held 256 MiB of them grew by a GiB in an hour and a half.
    """

    def room(pages: int) -> tuple[Tensor, Tensor]:
        shape, dtype = (pages, cache.keys[0].numel()), cache.keys.dtype
        return _mapped(shape, dtype), _mapped(shape, dtype)

    return room


def _mapped(shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    size = shape[0] * shape[1] * dtype.itemsize
    if size == 0:
        return torch.empty(shape, dtype=dtype)
    memory = mmap.mmap(-1, size)
    # Fewer page faults, which cost more than the copy.
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


class HeldRows:
    """The held caches of one worker, by the names that the scheduler gave them."""

    def __init__(self, cache: PagedCache, tables: PageTables) -> None:
        self._cache = cache
        self._tables = tables
        self._rows: dict[str, int] = {}
        self._parked: dict[str, CompressedState] = {}
        # The cards of the caches in both, the oldest first.
        self._cards: dict[str, HeldCard] = {}

    @property
    def cards(self) -> Mapping[str, HeldCard]:
        """Return what is known of each cache, by its name."""
        return self._cards

    @property
    def rows(self) -> list[int]:
        """Rows of those in pages."""
        return list(self._rows.values())

    def hold(self, hold: Hold, row: int) -> None:
        """Keep the cache at a row, which the caller gives up."""
        self._rows[hold.name] = row
        self._cards[hold.name] = hold.card

    def arrive(self, name: str, card: HeldCard, state: CompressedState) -> None:
        """Keep a cache from another engine in the host's memory."""
        self._parked[name] = state
        self._cards[name] = card

    def nbytes(self, name: str) -> int:
        """Return the bytes of a cache's keys and values."""
        if (parked := self._parked.get(name)) is not None:
            return parked.keys.nbytes + parked.values.nbytes
        page_bytes = self._cache.keys[0].numel() * self._cache.keys.element_size()
        return 2 * self._tables.used_pages(self._rows[name]) * page_bytes

    @torch.inference_mode()
    def export(self, name: str, room: Room) -> CompressedState:
        """Copy a cache out, which stays held."""
        if (parked := self._parked.get(name)) is None:
            return copied(self._cache, self._tables, self._rows[name], room)
        keys, values = room(len(parked.keys))
        keys.copy_(parked.keys)
        values.copy_(parked.values)
        return CompressedState(parked.lens, keys, values)

    @torch.inference_mode()
    def park(self, name: str) -> None:
        """Copy a cache to the host's memory: its blocks are about to be written."""
        row = self._rows.pop(name)
        self._parked[name] = copied(self._cache, self._tables, row, host_memory(self._cache))
        self._tables.release(row)

    def _copied(self, row: int, cut_tokens: int, slabs: list[int]) -> int:
        """Return a new row with a copy of a cache in pages, without its last tokens."""
        lens = self._tables.lens(row).to("cpu", copy=True) - cut_tokens
        copy = self._tables.place(lens, slabs)
        sources = self._tables.filled_pages(row, lens)
        move_pages(self._cache, sources, self._tables.filled_pages(copy))
        return copy

    def drop(self, name: str) -> None:
        """Forget a cache."""
        del self._cards[name]
        if self._parked.pop(name, None) is None:
            self._tables.release(self._rows.pop(name))

    @torch.inference_mode()
    def begin(self, name: str, cut_tokens: int, slabs: list[int], *, copies: bool) -> int:
        """Return a row with a cache, without its last tokens, for the caller.

        Args:
            slabs: all that it may use from now on. Those of a cache in pages that does not stay
                are the first.
            copies: whether the cache stays held, too.
        """
        if (state := self._parked.get(name)) is not None:
            if not copies:
                del self._parked[name], self._cards[name]
            shorter = state.without_last(cut_tokens, self._tables.page_tokens)
            return placed(self._cache, self._tables, shorter, slabs)
        if copies:
            return self._copied(self._rows[name], cut_tokens, slabs)
        row = self._rows.pop(name)
        del self._cards[name]
        have = len(self._tables.pages(row)) // self._tables.layout.pages_per_block
        if cut_tokens:
            lens = self._tables.lens(row) - cut_tokens
            move_pages(self._cache, *self._tables.shrink(row, lens, have))
        self._tables.add_slabs(row, slabs[have:])
        return row
