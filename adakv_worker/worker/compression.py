"""Compressions of prompts and captures of queries, layer by layer in a forward pass."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adakv_serve.kernels.blocks import SINK_TOKENS
from adakv_serve.kernels.paging.entries import PagedEntries
from adakv_serve.kernels.paging.paged_cache import Conversion, PagedCache, compact, compact_into
from adakv_serve.kernels.paging.pages import PageTables
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.policy import Policy, Scored, stacked
from adakv_serve.kernels.policies.reselection import fitted, with_sinks
from adakv_serve.kernels.transfer import sent
from adakv_worker.messages import Compress
from adakv_worker.worker.contained import Contained
from adakv_worker.worker.model_parts import LayerParts

# Bytes of scores held before their layers are copied: a few layers of a long prompt, all of a short
# one.
HELD_BYTES = 4 << 20


class Compression:
    """Compression of one request during the forward pass that completes its prompt.

    Each layer is scored right after its attention, while its queries are in memory, so that no
    queries are stored. Scores are held until there are enough of them to pay for a selection and a
    copy, or until all layers are scored if the policy needs all scores.

    An error of the policy stays here: the request then keeps its first and its most recent entries,
    as many as the policy would have kept. The prompt's blocks stay whole until the step ends, so a
    selection that failed halfway leaves nothing behind.
    """

    def __init__(
        self,
        request_id: str,
        command: Compress,
        blocks: Sequence[int],
        rows: slice,
        earlier: Tensor | None,
        cache: PagedCache,
        tables: PageTables,
        parts: Sequence[LayerParts],
        *,
        conversion: Conversion | None = None,
        held_bytes: int,
        record: bool,
    ) -> None:
        """
        Args:
            blocks: the prompt's blocks.
            rows: the prompt's tokens in the batch.
            earlier: [L, e, Hq, D], the first queries of the window, from earlier chunks.
            cache: the KV memory as pages of whole requests.
            conversion: to pages of compressed ones; None where those store numbers alike.
            held_bytes: bytes of scores to hold before their layers are copied.
        """
        self.command = command
        self._blocks = sent(blocks, tables.device)
        self._rows = rows
        self._earlier = earlier
        self._cache = cache
        self._conversion = conversion
        self._tables = tables
        self._parts = parts
        self._scored: dict[int, Scored] = {}
        self._held_bytes = 0
        self._most_held_bytes = held_bytes
        self._kept: dict[int, Tensor] | None = {} if record else None
        self.row = tables.open(command.slabs)
        self._contained = Contained(request_id, command.choice)
        with self._contained:
            self._policy: Policy = command.choice.build()
            entries = command.prompt_tokens - self._policy.scorer.window_tokens
            shape = (len(parts), tables.heads, entries)
            totals = self._policy.layer_totals(shape, command.keep)
            self._totals = self._with_sinks(totals, shape) if totals is not None else None

    @property
    def failed(self) -> bool:
        """Whether the policy raised an error, so that the entries are not its choice."""
        return self._contained.failed

    @property
    def nbytes(self) -> int:
        """Bytes held from layer to layer: scores, and queries of earlier chunks."""
        earlier = self._earlier
        return self._held_bytes + (
            0 if earlier is None else earlier.numel() * earlier.element_size()
        )

    def see(self, layer: int, query: Tensor) -> None:
        if not self.failed:
            with self._contained:
                self._score(layer, query)

    def _score(self, layer: int, query: Tensor) -> None:
        scored = self._policy.score(self._observe(layer, query))
        if self.command.sink_tokens:
            scored = with_sinks(scored, self.command.sink_tokens)
        self._scored[layer] = scored
        self._held_bytes += sum(t.numel() * t.element_size() for t in scored if t is not None)
        if self._totals is not None and self._held_bytes >= self._most_held_bytes:
            self._copy_scored(self._totals)

    def finish(self) -> Tensor | None:
        """Copy what is left after the last layer; return kept [L, H, n] bool if recorded."""
        if not self.failed:
            with self._contained:
                self._copy_scored(self._all_totals())
        if self.failed:
            self._keep_recent()
        if self._kept is None:
            return None
        return torch.stack([self._kept[layer] for layer in sorted(self._kept)])

    def _all_totals(self) -> list[int]:
        if self._totals is not None:
            return self._totals
        scored = [self._scored[layer].scores for layer in sorted(self._scored)]
        all_layers = torch.stack(scored)
        totals = self._policy.totals(all_layers, self.command.keep)
        return self._with_sinks(totals, all_layers.shape)

    def _with_sinks(self, totals: list[int], shape: Sequence[int]) -> list[int]:
        """Return `totals` for scores of `shape` [L, H, m] with room for each layer's sinks."""
        layers, heads, entries = shape
        least = heads * min(self.command.sink_tokens, entries)
        return fitted(totals, [least] * layers, [heads * entries] * layers)

    def _copy_scored(self, totals: list[int]) -> None:
        """Select and copy the layers whose scores are held, some at a time."""
        layers = sorted(self._scored)
        if not layers:
            return
        at_once = max(1, self._most_held_bytes * len(layers) // max(1, self._held_bytes))
        for first in range(0, len(layers), at_once):
            some = layers[first : first + at_once]
            scored = stacked([self._scored.pop(layer) for layer in some])
            kept = self._policy.allocate_layers(scored, [totals[layer] for layer in some])
            self._copy(some, kept)
        self._held_bytes = 0

    def _keep_recent(self) -> None:
        """Start over and select without scores: in each head the sinks and the newest entries."""
        self._scored.clear()
        self._earlier, self._held_bytes = None, 0
        self._tables.release(self.row)
        self.row = self._tables.open(self.command.slabs)
        n, keep = self.command.prompt_tokens, self.command.keep
        kept = torch.zeros((1, self._tables.heads, n), dtype=torch.bool, device=self._tables.device)
        sinks = min(SINK_TOKENS, keep // 2)
        kept[..., :sinks] = True
        kept[..., n - (keep - sinks) :] = True
        for layer in range(len(self._parts)):
            self._copy([layer], kept)

    def _copy(self, layers: list[int], kept: Tensor) -> None:
        """Copy the entries kept [K, H, n] of K layers into pages of their own."""
        lens = kept.sum(dim=-1, dtype=torch.int32)
        tables = self._tables.place_layers(self.row, layers, lens)
        index = sent(layers, self._tables.device)
        source = self._tables.layout.blocks_pages(self._blocks, index)
        if self._conversion is None:
            compact(kept, self._cache, source, tables, lens)
        else:
            compact_into(kept, self._cache, source, self._conversion, tables, lens)
        if self._kept is not None:
            self._kept |= zip(layers, kept, strict=True)

    def _observe(self, layer: int, query: Tensor) -> Observation:
        part, n = self._parts[layer], self.command.prompt_tokens
        pages = self._tables.layout.block_pages(self._blocks, layer).t()
        return Observation(
            self._window(layer, query),
            PagedEntries(self._cache.keys, pages, n, quantization=part.quantized_keys),
            PagedEntries(self._cache.values, pages, n, quantization=part.quantized_values),
            part.scale,
            part.rotary,
            part.output_weight,
            part.layer,
        )

    def _window(self, layer: int, query: Tensor) -> Tensor:
        """Return the queries [Hq, span, D] that the scorer looks at."""
        return window_queries(self._earlier, query[self._rows], self.command.query_span, layer)


def window_queries(earlier: Tensor | None, query: Tensor, span: int, layer: int) -> Tensor:
    """Return [Hq, span, D] of a window that ends with `query` [tokens, Hq, D].

    Args:
        query: the request's queries of this step.
        earlier: [L, e, Hq, D], the window's first queries, from earlier steps.

    Raises:
        LookupError: there are too few, since the device had no memory for those of earlier steps.
    """
    fresh = fresh_queries(earlier, query, span)
    if earlier is not None:
        fresh = torch.cat((earlier[layer], fresh))
    return fresh.transpose(0, 1)


def fresh_queries(earlier: Tensor | None, query: Tensor, span: int) -> Tensor:
    """Return the rows of `query` [tokens, Hq, D] that complete a window of `span` queries.

    Args:
        earlier: [L, e, Hq, D], the window's first queries.

    Raises:
        LookupError: there are too few, since the device had no memory for those of earlier steps.
    """
    have = 0 if earlier is None else earlier.shape[1]
    if span - have > len(query):
        raise LookupError(f"the window has {span} queries, only {have + len(query)} are there")
    return query[len(query) - (span - have) :]
