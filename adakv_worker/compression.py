"""What watches a forward pass: queries kept for later, and compressions, layer by layer."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from adakv_worker.commands import Compress
from adakv_worker.model_parts import LayerParts
from kernels.observation import Observation
from kernels.paged_cache import PagedCache, compact, read_blocks
from kernels.pages import PageTables
from kernels.policy import Policy


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

    Allocated only for a window that lies across two chunks of a prefill.
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

    Each layer is scored when it has attended, while its keys and queries are at hand, and copied at
    once unless the policy must see all layers first. So no queries are stored.
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
        self._blocks = torch.tensor(blocks, dtype=torch.int64)
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
        self._totals = self._policy.layer_totals(shape, command.keep)
        self._scores: dict[int, Tensor] = {}
        self._kept: dict[int, Tensor] | None = {} if record else None
        self.row = tables.open(command.slabs)

    @property
    def nbytes(self) -> int:
        """Bytes held from layer to layer: queries of chunks before, and scores not yet used."""
        held = [*self._scores.values(), *([] if self._earlier is None else [self._earlier])]
        return sum(tensor.numel() * tensor.element_size() for tensor in held)

    def see(self, layer: int, query: Tensor) -> None:
        scores = self._policy.scorer.score(self._observe(layer, query))
        if self._totals is None:
            self._scores[layer] = scores
        else:
            self._move(layer, self._policy.allocate_layer(scores, self._totals[layer]))

    def finish(self) -> Tensor | None:
        """After the last layer. Returns kept [L, H, n] bool, if recorded."""
        layers = range(len(self._parts))
        if self._totals is None:
            scores = torch.stack([self._scores[layer] for layer in layers])
            selection = self._policy.allocate(scores, self._command.keep)
            for layer in layers:
                self._move(layer, selection.kept[layer])
        return None if self._kept is None else torch.stack([self._kept[layer] for layer in layers])

    def _observe(self, layer: int, query: Tensor) -> Observation:
        part, n = self._parts[layer], self._command.prompt_tokens
        layout = self._tables.layout
        keys = read_blocks(self._cache.keys, layout, self._blocks, layer, n)
        values = keys.new_empty((*keys.shape[:2], 0))
        if self._policy.scorer.needs_values:
            values = read_blocks(self._cache.values, layout, self._blocks, layer, n)
        return Observation(
            self._window(layer, query),
            keys,
            values,
            part.scale,
            part.rotary,
            part.output_weight,
            part.layer,
        )

    def _window(self, layer: int, query: Tensor) -> Tensor:
        """[Hq, span, D]: the queries that the scorer wants."""
        have = 0 if self._earlier is None else self._earlier.shape[1]
        fresh = query[self._stop - (self._command.query_span - have) : self._stop]
        if self._earlier is not None:
            fresh = torch.cat((self._earlier[layer], fresh))
        return fresh.transpose(0, 1)

    def _move(self, layer: int, kept: Tensor) -> None:
        lens = kept.sum(dim=-1, dtype=torch.int32)
        tables = self._tables.place_layer(self.row, layer, lens)
        source = self._tables.layout.block_pages(self._blocks, layer)
        compact(kept, self._cache, source, tables, lens)
        if self._kept is not None:
            self._kept[layer] = kept
