"""The worker's side of compressed requests: captured queries, page tables, and compression."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from adakv_worker.commands import Capture, Compress, Kept
from adakv_worker.model_parts import LayerParts
from kernels.observation import Observation
from kernels.paged_cache import PagedCache, placed_slots, read_blocks, read_slots, write_slots
from kernels.pages import GrownStep, PageLayout, PageTables, check_page_tables


class _Queries(NamedTuple):
    """Queries of the last `span` of `prompt_tokens` tokens: buffer [L, span, Hq, D]."""

    prompt_tokens: int
    span: int
    buffer: Tensor


class CaptureSlice(NamedTuple):
    """Copy the queries of batch tokens [start, stop) to `target` [L, stop - start, Hq, D]."""

    start: int
    stop: int
    target: Tensor


class CompressedState(NamedTuple):
    """One request's compressed cache, to move or park it.

    lens: [L, H] int32. keys, values: [sum of lens, D], layer after layer, head after head.
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
        self._layout = layout
        self._parts = parts
        self.tables = PageTables(layout, cache.keys.shape[1], max_requests)
        self._rows: dict[str, int] = {}
        self._queries: dict[str, _Queries] = {}
        # Kept positions [L, H, n] bool by request, when recorded for debugging.
        self.selections: dict[str, Tensor] | None = {} if record_selections else None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._rows

    @property
    def extra_bytes(self) -> int:
        """Bytes held beside the engine's KV memory: page tables and captured queries."""
        captured = (queries.buffer for queries in self._queries.values())
        return self.tables.nbytes + sum(t.numel() * t.element_size() for t in captured)

    def forget(self, request_id: str) -> None:
        """The request ended or was preempted: its blocks are no longer its own."""
        self._queries.pop(request_id, None)
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
        self, request_id: str, capture: Capture, start: int, first_token: int, num_tokens: int
    ) -> CaptureSlice | None:
        """Prepares to keep the queries of this step's tokens that a scorer will want.

        Args:
            start: index of the request's first token in the batch.
            first_token: its position in the request.
            num_tokens: its tokens in this step.
        """
        prompt_tokens, span = capture
        if span == 0:
            return None
        window_start = prompt_tokens - span
        first = max(first_token, window_start)
        last = min(first_token + num_tokens, prompt_tokens)
        if first >= last:
            return None
        have = self._queries.get(request_id)
        if have is None or have.prompt_tokens != prompt_tokens:
            part = self._parts[0]
            shape = (len(self._parts), span, part.num_heads, self._cache.keys.shape[-1])
            have = _Queries(prompt_tokens, span, self._cache.keys.new_empty(shape))
            self._queries[request_id] = have
        return CaptureSlice(
            start + first - first_token,
            start + last - first_token,
            have.buffer[:, first - window_start : last - window_start],
        )

    def drop_queries(self, request_id: str) -> None:
        self._queries.pop(request_id, None)

    def compress(self, request_id: str, command: Compress, blocks: list[int]) -> Kept:
        """Scores the prompt in `blocks` and copies what is kept into pages of the slabs."""
        n = command.prompt_tokens
        block_ids = torch.tensor(blocks, dtype=torch.int64)
        policy = command.choice.build()
        queries = self._queries.pop(request_id, None)
        scores = torch.stack(
            [
                policy.scorer.score(
                    self._observe(layer, queries, block_ids, n, policy.scorer.needs_values)
                )
                for layer in range(len(self._parts))
            ]
        )
        selection = policy.allocate(scores, command.keep)
        row = self.tables.place(selection.lens, command.slabs)
        self._rows[request_id] = row
        for layer in range(len(self._parts)):
            self._move(layer, row, selection.kept[layer], block_ids)
        if self.selections is not None:
            self.selections[request_id] = selection.kept
        lens = selection.lens
        return {request_id: (float(lens.float().mean()), int(lens.min()), int(lens.max()))}

    def _observe(
        self, layer: int, queries: _Queries | None, blocks: Tensor, n: int, with_values: bool
    ) -> Observation:
        part = self._parts[layer]
        keys = read_blocks(self._cache.keys, self._layout, blocks, layer, n)
        values = keys.new_empty((*keys.shape[:2], 0))
        if with_values:
            values = read_blocks(self._cache.values, self._layout, blocks, layer, n)
        if queries is None:
            seen = keys.new_empty((part.num_heads, 0, keys.shape[-1]))
        else:
            seen = queries.buffer[layer].transpose(0, 1)
        return Observation(
            seen, keys, values, part.scale, part.rotary, part.output_weight, part.layer
        )

    def _move(self, layer: int, row: int, kept: Tensor, blocks: Tensor) -> None:
        """Copies the kept [H, n] entries of one layer, in order of position."""
        page_tokens = self.tables.page_tokens
        head, position = kept.nonzero(as_tuple=True)
        pages = self._layout.block_pages(blocks, layer)
        source = pages[position // page_tokens, head] * page_tokens + position % page_tokens
        target = placed_slots(
            self.tables.tables[row, layer], self.tables.lens[row, layer], page_tokens
        )
        write_slots(self._cache, target, *read_slots(self._cache, source))

    @torch.inference_mode()
    def export(self, request_id: str) -> CompressedState:
        """Copies a compressed request's cache out, between two steps."""
        row = self._rows[request_id]
        keys, values = read_slots(self._cache, self._all_slots(row))
        return CompressedState(self.tables.lens[row].clone(), keys, values)

    @torch.inference_mode()
    def restore(self, request_id: str, state: CompressedState, slabs: list[int]) -> None:
        """Places an exported cache into `slabs`.

        Raises:
            ValueError: the slabs are too few; nothing has changed then.
        """
        self.forget(request_id)
        row = self.tables.place(state.lens, slabs)
        self._rows[request_id] = row
        write_slots(self._cache, self._all_slots(row), state.keys, state.values)

    def _all_slots(self, row: int) -> Tensor:
        return placed_slots(
            self.tables.tables[row].flatten(0, 1),
            self.tables.lens[row].flatten(),
            self.tables.page_tokens,
        )

    def check(self) -> None:
        """Asserts the invariants of all page tables."""
        check_page_tables(self.tables, list(self._rows.values()))
