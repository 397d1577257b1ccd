"""What watches a forward pass: queries kept for later, and compressions, layer by layer."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from adakv_worker.commands import Compress
from adakv_worker.model_parts import LayerParts
from kernels.eviction import fitted, with_sinks
from kernels.observation import Observation
from kernels.paged_cache import PagedCache, compact, read_blocks
from kernels.pages import PageTables
from kernels.policy import Policy, Scored, stacked
from kernels.transfer import sent

# Scores held before their layers are copied: a few layers of a long prompt, all of a short one.
_HELD_BYTES = 4 << 20


class Watcher(Protocol):
    def see(self, layer: int, query: Tensor) -> None:
        """Called by the backend once a layer has attended.

        Args:
            layer: its index in the cache.
            query: [tokens, Hq, D] of the whole batch, after RoPE.
        """
        ...


class Window(NamedTuple):
    """The queries of the last `span` of `prompt_tokens` tokens: queries [L, span, Hq, D].

    Allocated only for a window that lies across two chunks of a prefill, and for evictions, of
    which `prompt_tokens` counts the answer so far as well.
    """

    prompt_tokens: int
    span: int
    queries: Tensor


class Capture(NamedTuple):
    """Copies the queries of batch tokens [start, stop) to `target` [L, stop - start, Hq, D]."""

    start: int
    stop: int
    target: Tensor

    def see(self, layer: int, query: Tensor) -> None:
        self.target[layer] = query[self.start : self.stop]


class Compression:
    """One request's compression during the forward pass that completes its prompt.

    Each layer is scored when it has attended, while its keys and queries are at hand, so that no
    queries need be stored. Scores are held until there are enough of them to be worth the overhead
    of selecting and copying, or until all layers are scored where the policy must see all.
    """

    def __init__(
        self,
        command: Compress,
        blocks: Sequence[int],
        stop: int,
        earlier: Tensor | None,
        cache: PagedCache,
        tables: PageTables,
        parts: Sequence[LayerParts],
        *,
        record: bool,
    ) -> None:
        """
        Args:
            blocks: the prompt's blocks.
            stop: index in the batch after the prompt's last token.
            earlier: [L, e, Hq, D], the first queries of the window, from chunks before.
        """
        self._command = command
        self._blocks = sent(blocks, tables.device)
        self._stop = stop
        self._earlier = earlier
        self._cache = cache
        self._tables = tables
        self._parts = parts
        self._policy: Policy = command.choice.build()
        shape = (
            len(parts),
            tables.heads,
            command.prompt_tokens - self._policy.scorer.window_tokens,
        )
        totals = self._policy.layer_totals(shape, command.keep)
        self._totals = self._with_sinks(totals, shape) if totals is not None else None
        self._scored: dict[int, Scored] = {}
        self._held_bytes = 0
        self._kept: dict[int, Tensor] | None = {} if record else None
        self.row = tables.open(command.slabs)

    @property
    def nbytes(self) -> int:
        """Bytes held from layer to layer: scores, and queries of chunks before."""
        earlier = self._earlier
        return self._held_bytes + (
            0 if earlier is None else earlier.numel() * earlier.element_size()
        )

    def see(self, layer: int, query: Tensor) -> None:
        scored = self._policy.score(self._observe(layer, query))
        if self._command.sink_tokens:
            scored = with_sinks(scored, self._command.sink_tokens)
        self._scored[layer] = scored
        self._held_bytes += sum(t.numel() * t.element_size() for t in scored if t is not None)
        if self._totals is not None and self._held_bytes >= _HELD_BYTES:
            self._copy_scored(self._totals)

    def finish(self) -> Tensor | None:
        """After the last layer. Returns kept [L, H, n] bool, if recorded."""
        totals = self._totals
        if totals is None:
            all_layers = stacked([self._scored[layer] for layer in sorted(self._scored)])
            totals = self._policy.totals(all_layers.scores, self._command.keep)
            totals = self._with_sinks(totals, all_layers.scores.shape)
        self._copy_scored(totals)
        if self._kept is None:
            return None
        return torch.stack([self._kept[layer] for layer in sorted(self._kept)])

    def _with_sinks(self, totals: list[int], shape: Sequence[int]) -> list[int]:
        """`totals` of scores of `shape` [L, H, m] that leave room for each layer's sinks."""
        layers, heads, entries = shape
        least = heads * min(self._command.sink_tokens, entries)
        return fitted(totals, [least] * layers, [heads * entries] * layers)

    def _copy_scored(self, totals: list[int]) -> None:
        """Selects and copies the layers whose scores are held."""
        layers = sorted(self._scored)
        if not layers:
            return
        scored = stacked([self._scored[layer] for layer in layers])
        self._scored.clear()
        self._held_bytes = 0
        kept = self._policy.allocate_layers(scored, [totals[layer] for layer in layers])
        lens = kept.sum(dim=-1, dtype=torch.int32)
        tables = self._tables.place_layers(self.row, layers, lens)
        index = sent(layers, self._tables.device)
        source = self._tables.layout.blocks_pages(self._blocks, index)
        compact(kept, self._cache, source, tables, lens)
        if self._kept is not None:
            self._kept |= zip(layers, kept, strict=True)

    def _observe(self, layer: int, query: Tensor) -> Observation:
        part, n = self._parts[layer], self._command.prompt_tokens
        layout = self._tables.layout
        paged_keys = read_blocks(self._cache.keys, layout, self._blocks, layer)
        keys = paged_keys[:, :n]
        values = keys.new_empty((*keys.shape[:2], 0))
        if self._policy.needs_values:
            values = read_blocks(self._cache.values, layout, self._blocks, layer)[:, :n]
        return Observation(
            self._window(layer, query),
            keys,
            values,
            part.scale,
            part.rotary,
            part.output_weight,
            part.layer,
            paged_keys,
        )

    def _window(self, layer: int, query: Tensor) -> Tensor:
        """[Hq, span, D]: the queries that the scorer wants."""
        return window_queries(self._earlier, query[: self._stop], self._command.query_span, layer)


def window_queries(earlier: Tensor | None, query: Tensor, span: int, layer: int) -> Tensor:
    """[Hq, span, D] of a window that ends with `query` [tokens, Hq, D].

    Args:
        earlier: [L, e, Hq, D], its first queries, from steps before.
    """
    have = 0 if earlier is None else earlier.shape[1]
    fresh = query[len(query) - (span - have) :]
    if earlier is not None:
        fresh = torch.cat((earlier[layer], fresh))
    return fresh.transpose(0, 1)
