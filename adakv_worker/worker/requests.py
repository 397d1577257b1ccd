"""The compressed requests of one worker: their page tables, and their running watchers."""

import functools
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from adakv_serve.kernels.paging.growth import ExtendedStep, GrownStep
from adakv_serve.kernels.paging.paged_cache import Conversion, PagedCache, move_pages
from adakv_serve.kernels.paging.pages import PageTables, check_page_tables
from adakv_worker.messages import (
    WITHOUT_QUERIES,
    Answer,
    Compress,
    Evict,
    Kept,
    Recompress,
)
from adakv_worker.session_messages import Hold, Resume
from adakv_worker.worker.compression import HELD_BYTES, Compression
from adakv_worker.worker.eviction import Eviction, Recompression
from adakv_worker.worker.head_detail import head_detail, lists_tokens
from adakv_worker.worker.held_rows import HeldRows, Room, copied, memory_on, placed
from adakv_worker.worker.model_parts import LayerParts
from adakv_worker.worker.packed_state import CompressedState
from adakv_worker.worker.windows import Windows


class CompressionState:
    """All compressed requests of one worker, whichever attention backend it has.

    held_bytes: bytes of scores that a compression holds before it copies their layers.
    held: caches that their requests have left.
    windows: queries for the scorers of later steps.
    """

    def __init__(
        self,
        slabs: PagedCache,
        tables: PageTables,
        parts: Sequence[LayerParts],
        *,
        blocks: PagedCache | None = None,
        conversion: Conversion | None = None,
        record_selections: bool = False,
    ) -> None:
        """
        Args:
            slabs: the KV memory as pages of compressed requests.
            blocks: the same memory as pages of whole ones; None where they are alike.
            conversion: from entries of blocks to those of slabs; None where they are alike.
        """
        self._cache = slabs
        self._blocks = blocks or slabs
        self._conversion = conversion
        self._parts = parts
        self.tables = tables
        self.held_bytes = HELD_BYTES
        self._rows: dict[str, int] = {}
        self.held = HeldRows(slabs, tables)
        heads = (parts[0].num_heads, self.head_size)
        self.windows = Windows(len(parts), heads, parts[0].dtype, tables.device)
        self._compressing: dict[str, Compression] = {}
        self._evicting: dict[str, Eviction] = {}
        # Resumed requests whose prompts are not complete.
        self._resuming: set[str] = set()
        # Those of them whose prompts this step completes.
        self._recompressing: dict[str, Recompress] = {}
        # Kept positions [L, H, n] bool by request, recorded for debugging: those of its prompt, or
        # of all tokens cached at its last eviction.
        self.selections: dict[str, Tensor] | None = {} if record_selections else None

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._rows

    @property
    def extra_bytes(self) -> int:
        """Bytes held beside the engine's KV memory: tables, queries and scores."""
        watching: list[Compression | Eviction] = [
            *self._compressing.values(),
            *self._evicting.values(),
        ]
        running = sum(watcher.nbytes for watcher in watching)
        return self.tables.nbytes + self.windows.nbytes + running

    def is_compressed(self, request_id: str) -> bool:
        """Return whether a request's prompt is complete, and its cache compressed."""
        return request_id in self._rows and request_id not in self._resuming

    def forget(self, request_id: str) -> None:
        """Forget a request that ended or was preempted, if it is here."""
        self.windows.take(request_id)
        self._resuming.discard(request_id)
        if self.selections is not None:
            self.selections.pop(request_id, None)
        if request_id in self._rows:
            self.tables.release(self._rows.pop(request_id))

    def hold(self, request_id: str, hold: Hold) -> None:
        """Keep a request's cache, after the request."""
        self.windows.take(request_id)
        self._resuming.discard(request_id)
        self.held.hold(hold, self._rows.pop(request_id))
        if self.selections is not None and request_id in self.selections:
            self.selections[hold.name] = self.selections.pop(request_id)

    def drop(self, name: str) -> None:
        """Forget a held cache."""
        self.held.drop(name)
        if self.selections is not None:
            self.selections.pop(name, None)

    def resume(self, request_id: str, command: Resume) -> None:
        """Give a request that begins a held cache, cut back by some tokens, and its other slabs."""
        held, _, cut_tokens, slabs, copies = command
        self._rows[request_id] = self.held.begin(held, cut_tokens, slabs, copies=copies)
        self._resuming.add(request_id)
        if self.selections is not None and held in self.selections:
            positions = self.selections[held]
            self.selections[request_id] = positions[..., : command.tokens]
            if not copies:
                del self.selections[held]

    def add_slabs(self, request_id: str, slabs: list[int]) -> None:
        self.tables.add_slabs(self._rows[request_id], slabs)

    def rows(self, request_ids: Iterable[str]) -> list[int]:
        """Return the page-table rows of those of these requests that are compressed."""
        return [row for name in request_ids if (row := self._rows.get(name)) is not None]

    def grow(self, request_ids: Sequence[str], graph_rows: int | None = None) -> GrownStep:
        """Add one entry to every head of the requests: see `PageTables.grow`."""
        return self.tables.grow(self.rows(request_ids), graph_rows)

    def extend(self, request_ids: Sequence[str], tokens: Sequence[int]) -> ExtendedStep:
        """Add `tokens` [R] entries to every head of the requests: see `PageTables.extend`."""
        return self.tables.extend(self.rows(request_ids), tokens)

    def compress(
        self,
        request_id: str,
        command: Compress,
        blocks: Sequence[int],
        start: int,
        first_token: int,
    ) -> Compression:
        """Begin the compression of a request whose prompt this step completes.

        Args:
            blocks: the prompt's blocks.
            start: index of the request's first token in the batch.
            first_token: its position in the request.
        """
        window = self.windows.take(request_id)
        before = first_token - (command.prompt_tokens - command.query_span)
        earlier = None
        if before > 0 and window is not None:
            earlier = window.queries[:, :before]
        compression = Compression(
            request_id,
            command,
            blocks,
            slice(start, start + command.prompt_tokens - first_token),
            earlier,
            self._blocks,
            self.tables,
            self._parts,
            conversion=self._conversion,
            held_bytes=self.held_bytes,
            record=self.selections is not None or lists_tokens(command),
        )
        self._compressing[request_id] = compression
        return compression

    def finish_compressions(self) -> Answer:
        """Finish after the forward pass; the requests are compressed from the next step on."""
        answer = Answer({}, [])
        for request_id, compression in self._compressing.items():
            positions = compression.finish()
            if self.selections is not None and positions is not None:
                self.selections[request_id] = positions.cpu()
            row = self._rows[request_id] = compression.row
            answer.kept[request_id] = kept = self._kept(row)
            if compression.command.detail:
                detail = head_detail(self.tables.lens(row), positions)
                answer.kept[request_id] = kept._replace(detail=detail)
            if compression.failed:
                answer.failed.append(request_id)
        self._compressing.clear()
        return answer

    def evict(self, request_id: str, command: Evict, start: int) -> Eviction:
        """Begin the eviction of a compressed request with this step's token.

        Args:
            start: index of that token in the batch.
        """
        earlier = self._earlier_queries(request_id, command, 1)
        if earlier is None and command.query_span > 1:
            # Its cache came from an engine with other settings: one eviction goes without queries.
            command = command._replace(choice=WITHOUT_QUERIES, query_span=0)
        return self._begin(request_id, Eviction, command, slice(start, start + 1), earlier)

    def recompress(
        self, request_id: str, command: Recompress, start: int, tokens: int
    ) -> Eviction | None:
        """Begin the compression of a resumed request whose prompt this step completes.

        Args:
            start: index of its first token in the batch.
            tokens: its tokens in this step.

        Returns:
            None if all its entries stay.
        """
        self._recompressing[request_id] = command
        rows = slice(start, start + tokens)
        earlier = self._earlier_queries(request_id, command, tokens)
        if command.among is None:
            return self._begin(request_id, Eviction, command, rows, earlier)
        if command.keep >= command.among:
            return None
        kind = functools.partial(Recompression, among=command.among)
        return self._begin(request_id, kind, command, rows, earlier)

    def _earlier_queries(
        self, request_id: str, command: Evict | Recompress, tokens: int
    ) -> Tensor | None:
        """Return the window's queries from before this step's `tokens`, if they were captured."""
        window = self.windows.take(request_id)
        before = command.query_span - tokens
        if before <= 0 or window is None or window[:2] != (command.tokens, command.query_span):
            return None
        return window.queries[:, :before]

    def _begin(
        self,
        request_id: str,
        kind: Callable[..., Eviction],
        command: Evict | Recompress,
        rows: slice,
        earlier: Tensor | None,
    ) -> Eviction:
        row = self._rows[request_id]
        eviction = kind(
            request_id, command, row, rows, earlier, self._cache, self.tables, self._parts
        )
        self._evicting[request_id] = eviction
        return eviction

    def finish_evictions(self) -> Answer:
        """Finish after the forward pass, recompressions too; return what those keep."""
        answer = Answer({}, [])
        for request_id, eviction in self._evicting.items():
            kept = eviction.finish()
            # A cache that came from another engine has no record.
            if self.selections is not None and request_id in self.selections:
                before = self.selections[request_id]
                self.selections[request_id] = _still_kept(before, kept.cpu(), eviction.tokens)
            if eviction.failed:
                answer.failed.append(request_id)
        for request_id, command in self._recompressing.items():
            row = self._rows[request_id]
            if request_id not in self._evicting:
                # A cache that was cut back may have had more slabs than it needs.
                lens = self.tables.lens(row)
                move_pages(self._cache, *self.tables.shrink(row, lens, command.slabs))
            answer.kept[request_id] = self._kept(row)
        self._resuming -= self._recompressing.keys()
        self._evicting.clear()
        self._recompressing.clear()
        return answer

    def _kept(self, row: int) -> Kept:
        # Waits for the device.
        lens = self.tables.lens(row).cpu()
        return Kept(float(lens.float().mean()), int(lens.min()), int(lens.max()))

    @property
    def cache_shape(self) -> tuple[int, int, int, int]:
        """Number of layers, KV heads, entries of a page, and numbers of the pool in an entry."""
        return (*self.tables.layout.offsets.shape, *self._cache.keys.shape[1:])

    @property
    def head_size(self) -> int:
        """Numbers of a query's head."""
        return self._parts[0].head_size

    @property
    def block_tokens(self) -> int:
        """Tokens of a block of a whole request."""
        return self._blocks.keys.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the pages' numbers, as they lie in memory."""
        return self._cache.keys.dtype

    @property
    def packing(self) -> str:
        return self._cache.packing

    @torch.inference_mode()
    def export(self, request_id: str, room: Room | None = None) -> CompressedState:
        """Copy a compressed request's cache out, between two steps.

        Args:
            room: None takes fresh memory on the cache's device.
        """
        room = room or memory_on(self.tables.device, self._cache)
        state = copied(self._cache, self.tables, self._rows[request_id], room)
        return state._replace(window=self.windows.get(request_id))

    @torch.inference_mode()
    def restore(self, request_id: str, state: CompressedState, slabs: list[int]) -> None:
        """Place an exported cache in `slabs`.

        Raises:
            ValueError: the slabs are too few; nothing has changed then.
        """
        self.forget(request_id)
        self._rows[request_id] = placed(self._cache, self.tables, state, slabs)
        if state.window is not None:
            self.windows.put(request_id, state.window)

    def check(self) -> None:
        """Assert the invariants of all page tables."""
        check_page_tables(self.tables, [*self._rows.values(), *self.held.rows])


def _still_kept(positions: Tensor, kept: Tensor, tokens: int) -> Tensor:
    """Return kept positions [L, H, tokens] after an eviction that keeps `kept` [L, H, e].

    Args:
        positions: [L, H, n] bool, kept before among the first n; all later ones were kept.
    """
    held = torch.nn.functional.pad(positions, (0, tokens - positions.shape[-1]), value=True)
    for layer, head in torch.cartesian_prod(*map(torch.arange, held.shape[:2])).tolist():
        places = held[layer, head].nonzero()[:, 0]
        held[layer, head, places] = kept[layer, head, : len(places)]
    return held
