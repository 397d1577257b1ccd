"""One request's eviction while it decodes: its cache is cut down where it lies."""

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from adakv_worker.commands import Evict
from adakv_worker.compression import window_queries
from adakv_worker.model_parts import LayerParts
from kernels.eviction import reallocate, score_heads, stacked_layers
from kernels.observation import Observation
from kernels.paged_cache import PagedCache, compact_in_place, move_pages, read_heads
from kernels.pages import PageTables
from kernels.policy import Policy, Scored


class Eviction:
    """Scores each layer when it has attended, and evicts after the last one.

    In place: what a head keeps moves to the front of the head's own pages, and pages in slabs that
    the request gives back move to pages that have become free in those that it keeps. So a request
    never holds more than its bound; beside it lie a layer's entries at a time, the scores, and the
    window's queries.
    """

    def __init__(
        self,
        command: Evict,
        row: int,
        position: int,
        earlier: Tensor | None,
        cache: PagedCache,
        tables: PageTables,
        parts: Sequence[LayerParts],
    ) -> None:
        """
        Args:
            row: the request's, in the tables.
            position: index of its token in the batch.
            earlier: [L, e, Hq, D], the window's queries but the last.
        """
        self._command = command
        self._row = row
        self._position = position
        self._earlier = earlier
        self._cache = cache
        self._tables = tables
        self._parts = parts
        self._policy: Policy = command.choice.build()
        self._scored: dict[int, Scored] = {}

    @property
    def tokens(self) -> int:
        """The request's, when it evicts."""
        return self._command.tokens

    @property
    def nbytes(self) -> int:
        """Bytes held from layer to layer: scores, and queries of steps before."""
        held = [tensor for scored in self._scored.values() for tensor in scored]
        return sum(t.numel() * t.element_size() for t in (*held, self._earlier) if t is not None)

    @functools.cached_property
    def _lens(self) -> list[list[int]]:
        """Entries of each layer's heads: the device is waited for once, and not in every layer."""
        lens: list[list[int]] = self._tables.lens(self._row).tolist()
        return lens

    def see(self, layer: int, query: Tensor) -> None:
        self._scored[layer] = score_heads(self._policy, self._observe(layer, query))

    def finish(self) -> Tensor:
        """After the last layer. Returns kept [L, H, n] bool of the entries that there were."""
        tables, row = self._tables, self._row
        scored = stacked_layers([self._scored[layer] for layer in sorted(self._scored)])
        kept = reallocate(self._policy, scored, tables.lens(row), self._command.keep)
        lens = kept.sum(dim=-1, dtype=torch.int32)
        pages = tables.tables(row)
        for layer in range(len(kept)):
            part = slice(layer, layer + 1)
            compact_in_place(kept[part], self._cache, pages[part], lens[part])
        move_pages(self._cache, *tables.shrink(row, lens, self._command.slabs))
        return kept

    def _observe(self, layer: int, query: Tensor) -> list[Observation]:
        """Each head as a cache of its own."""
        part, group = self._parts[layer], self._parts[layer].num_heads // self._tables.heads
        queries = window_queries(
            self._earlier, query[: self._position + 1], self._command.query_span, layer
        )
        lens = self._lens[layer]
        # Tables are as wide as the longest head of any request.
        used = -(-max(lens) // self._tables.page_tokens)
        pages = self._tables.tables(self._row)[layer, :, :used].long()
        weights = _columns(part.output_weight, self._tables.heads)
        keys = read_heads(self._cache.keys, pages)
        values = None
        if self._policy.needs_values:
            values = read_heads(self._cache.values, pages)
        observed = []
        for head, entries in enumerate(lens):
            paged = keys[head : head + 1]
            mine = paged[:, :entries]
            observed.append(
                Observation(
                    queries[head * group : (head + 1) * group],
                    mine,
                    mine.new_empty((1, entries, 0))
                    if values is None
                    else values[head : head + 1, :entries],
                    part.scale,
                    part.rotary,
                    None if weights is None else functools.partial(weights, head),
                    part.layer,
                    paged,
                    self._command.tokens,
                    head,
                )
            )
        return observed


def _columns(
    output_weight: Callable[[], Tensor] | None, heads: int
) -> Callable[[int], Tensor] | None:
    """What an output projection does with the values of each KV head."""
    if output_weight is None:
        return None
    # Engines repack weights, so that one call costs as much as a product with them.
    weight = functools.cache(output_weight)
    return lambda head: weight().chunk(heads, dim=1)[head]
