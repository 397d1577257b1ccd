"""The worker's side of compressed requests: their page tables, and what watches their prefills."""

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adakv_worker import commands
from adakv_worker.commands import Compress, Kept
from adakv_worker.compression import Capture, Compression, Window
from adakv_worker.model_parts import LayerParts
from kernels.growth import GrownStep
from kernels.paged_cache import PagedCache, read_pages, write_pages
from kernels.pages import PageLayout, PageTables, check_page_tables


class CompressedState(NamedTuple):
    """One request's compressed cache, to move or park it.

    lens: [L, H] int32. keys, values: [pages, page_tokens * D], layer after layer, head after head,
    each page packed as the cache that it is from.
    """

    lens: Tensor
    keys: Tensor
    values: Tensor


class CompressionState:
    """All compressed requests of one worker. Independent of how a backend attends."""

    def __init__(
        self,
        cache: PagedCache,
        layout: PageLayout,
        parts: Sequence[LayerParts],
        max_requests: int,
        *,
        record_selections: bool = False,
    ) -> None:
        self._cache = cache
        self._parts = parts
        self.tables = PageTables(layout, cache.keys.shape[1], max_requests)
        self._rows: dict[str, int] = {}
        self._windows: dict[str, Window] = {}
        self._compressing: dict[str, Compression] = {}
        # Kept positions [L, H, n] bool by request, when recorded for debugging.
        self.selections: dict[str, Tensor] | None = {} if record_selections else None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._rows

    @property
    def extra_bytes(self) -> int:
        """Bytes held beside the engine's KV memory: tables, queries and scores."""
        windows = [window.queries for window in self._windows.values()]
        held = sum(queries.numel() * queries.element_size() for queries in windows)
        running = sum(compression.nbytes for compression in self._compressing.values())
        return self.tables.nbytes + held + running

    def forget(self, request_id: str) -> None:
        """The request ended or was preempted: its blocks are no longer its own."""
        self._windows.pop(request_id, None)
        if self.selections is not None:
            self.selections.pop(request_id, None)
        if request_id in self._rows:
            self.tables.release(self._rows.pop(request_id))

    def add_slabs(self, request_id: str, slabs: list[int]) -> None:
        self.tables.add_slabs(self._rows[request_id], slabs)

    def grow(self, request_ids: Sequence[str]) -> GrownStep:
        """One more entry for every head of the requests."""
        return self.tables.grow([self._rows[request_id] for request_id in request_ids])

    def capture(
        self,
        request_id: str,
        command: commands.Capture,
        start: int,
        first_token: int,
        num_tokens: int,
    ) -> Capture | None:
        """Prepares to keep the queries of this step's tokens that a scorer will want.

        Args:
            start: index of the request's first token in the batch.
            first_token: its position in the request.
            num_tokens: its tokens in this step.
        """
        prompt_tokens, span = command
        window_start = prompt_tokens - span
        first = max(first_token, window_start)
        last = first_token + num_tokens
        if first >= last:
            return None
        window = self._windows.get(request_id)
        if window is None or window.prompt_tokens != prompt_tokens:
            shape = (len(self._parts), span, self._parts[0].num_heads, self._cache.keys.shape[-1])
            window = Window(prompt_tokens, span, self._cache.keys.new_empty(shape))
            self._windows[request_id] = window
        return Capture(
            start + first - first_token,
            start + last - first_token,
            window.queries[:, first - window_start : last - window_start],
        )

    def drop_windows(self, request_ids: Iterable[str]) -> None:
        """Forgets queries kept for compressions that were skipped in the end."""
        if self._windows:
            for request_id in request_ids:
                self._windows.pop(request_id, None)

    def compress(
        self,
        request_id: str,
        command: Compress,
        blocks: Sequence[int],
        start: int,
        first_token: int,
    ) -> Compression:
        """Begins the compression of a request whose prompt this step completes.

        Args:
            blocks: the prompt's blocks.
            start: index of the request's first token in the batch.
            first_token: its position in the request.
        """
        window = self._windows.pop(request_id, None)
        before = first_token - (command.prompt_tokens - command.query_span)
        earlier = None
        if before > 0:
            assert window is not None, "the scheduler asked for no queries of the chunks before"
            earlier = window.queries[:, :before]
        compression = Compression(
            command,
            blocks,
            start + command.prompt_tokens - first_token,
            earlier,
            self._cache,
            self.tables,
            self._parts,
            record=self.selections is not None,
        )
        self._compressing[request_id] = compression
        return compression

    def finish_compressions(self) -> Kept:
        """After the forward pass: the requests are compressed from the next step on."""
        kept: Kept = {}
        for request_id, compression in self._compressing.items():
            positions = compression.finish()
            if self.selections is not None and positions is not None:
                self.selections[request_id] = positions
            self._rows[request_id] = compression.row
            lens = self.tables.lens(compression.row)
            kept[request_id] = (float(lens.float().mean()), int(lens.min()), int(lens.max()))
        self._compressing.clear()
        return kept

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Layers, KV heads, entries of a page, head size."""
        return (*self.tables.layout.offsets.shape, *self._cache.keys.shape[1:])

    @property
    def packing(self) -> str:
        return self._cache.packing

    @torch.inference_mode()
    def export(
        self, request_id: str, room: Callable[[int], tuple[Tensor, Tensor]] | None = None
    ) -> CompressedState:
        """Copies a compressed request's cache out, between two steps.

        Args:
            room: makes it for the keys and values of so many pages; None takes fresh memory.
        """
        row = self._rows[request_id]
        pages = self.tables.filled_pages(row)
        if room is None:
            shape = (len(pages), self._cache.keys[0].numel())
            keys, values = self._cache.keys.new_empty(shape), self._cache.values.new_empty(shape)
        else:
            keys, values = room(len(pages))
        read_pages(self._cache, pages, keys, values)
        return CompressedState(self.tables.lens(row).clone(), keys, values)

    @torch.inference_mode()
    def restore(self, request_id: str, state: CompressedState, slabs: list[int]) -> None:
        """Places an exported cache into `slabs`.

        Raises:
            ValueError: the slabs are too few; nothing has changed then.
        """
        self.forget(request_id)
        row = self.tables.place(state.lens, slabs)
        self._rows[request_id] = row
        write_pages(self._cache, self.tables.filled_pages(row), state.keys, state.values)

    def check(self) -> None:
        """Asserts the invariants of all page tables."""
        check_page_tables(self.tables, list(self._rows.values()))
