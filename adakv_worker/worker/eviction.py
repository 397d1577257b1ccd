"""Evictions of decoding requests, which cut a cache in place."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from adakv_serve.kernels.paging.entries import PagedEntries, of_all_layers
from adakv_serve.kernels.paging.paged_cache import PagedCache, compact_in_place, move_pages
from adakv_serve.kernels.paging.pages import PageTables
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.policy import Policy, Scored, stacked
from adakv_serve.kernels.policies.reselection import (
    keep_recent,
    reallocate,
    score_heads,
    score_ragged,
    stacked_layers,
)
from adakv_worker.messages import Evict, Recompress
from adakv_worker.worker.compression import fresh_queries, window_queries
from adakv_worker.worker.contained import Contained
from adakv_worker.worker.model_parts import LayerParts


class Eviction:
    """Eviction of one request, which sees each layer after its attention and ends the last one.

    A policy that scores heads of different lengths at once scores all layers at the end, from
    their queries; any other one scores each layer as it is seen.

    The entries that a head keeps move to the front of the head's own pages. Then pages in slabs
    that the request gives back move to free pages in slabs that it keeps. So a request never holds
    more than its bound, apart from the scores and the window's queries.

    An error of the policy stays here: the request then keeps its first and its most recent entries,
    as many as the policy would have kept.
    """

    def __init__(
        self,
        request_id: str,
        command: Evict | Recompress,
        row: int,
        rows: slice,
        earlier: Tensor | None,
        cache: PagedCache,
        tables: PageTables,
        parts: Sequence[LayerParts],
    ) -> None:
        """
        Args:
            row: the request's row in the tables.
            rows: its tokens in the batch.
            earlier: [L, e, Hq, D], the window's queries from earlier steps.
        """
        self._command = command
        self._row = row
        self._rows = rows
        self._earlier = earlier
        self._cache = cache
        self._tables = tables
        self._parts = parts
        self._scored: dict[int, Scored] = {}
        # This step's queries [tokens, Hq, D] of each layer that waits for the end.
        self._queries: dict[int, Tensor] = {}
        self._contained = Contained(request_id, command.choice)
        with self._contained:
            self._policy: Policy = command.choice.build()

    @property
    def tokens(self) -> int:
        """Tokens of the request when it evicts."""
        return self._command.tokens

    @property
    def nbytes(self) -> int:
        """Bytes held from layer to layer: scores, and queries of earlier steps."""
        held = [tensor for scored in self._scored.values() for tensor in scored]
        held += self._queries.values()
        return sum(t.numel() * t.element_size() for t in (*held, self._earlier) if t is not None)

    @functools.cached_property
    def _lens(self) -> list[list[int]]:
        """Entries of each layer's heads, read once: each read waits for the device."""
        lens: list[list[int]] = self._tables.lens(self._row).tolist()
        return lens

    @property
    def failed(self) -> bool:
        """Whether the policy raised an error, so that the entries are not its choice."""
        return self._contained.failed

    def see(self, layer: int, query: Tensor) -> None:
        if not self.failed:
            with self._contained:
                if self._at_once:
                    fresh = fresh_queries(
                        self._earlier, query[self._rows], self._command.query_span
                    )
                    # The forward pass reuses the memory of its queries.
                    self._queries[layer] = fresh.clone()
                else:
                    self._scored[layer] = self._score(self._observe(layer, query))

    @functools.cached_property
    def _at_once(self) -> bool:
        """Whether all layers are scored in one call."""
        same_scale = len({part.scale for part in self._parts}) == 1
        return self._policy.scores_ragged and same_scale

    def _score(self, heads: list[Observation]) -> Scored:
        return score_heads(self._policy, heads)

    def finish(self) -> Tensor:
        """Evict after the last layer; return kept [L, H, n] bool of the entries before."""
        tables, row = self._tables, self._row
        kept = self._select()
        lens = kept.sum(dim=-1, dtype=torch.int32)
        pages = tables.tables(row)
        compact_in_place(kept, self._cache, pages, lens)
        move_pages(self._cache, *tables.shrink(row, lens, self._command.slabs))
        return kept

    def _select(self) -> Tensor:
        lens, keep = self._tables.lens(self._row), self._command.keep
        if not self.failed:
            with self._contained:
                return reallocate(self._policy, self._all_scored(lens), lens, keep)
        self._scored.clear()
        self._queries.clear()
        self._earlier = None
        return keep_recent(lens, keep)

    def _all_scored(self, lens: Tensor) -> Scored:
        """Return the scores [L, H, n - window] of all layers, whose heads have lens [L, H]."""
        if not self._at_once:
            return stacked_layers([self._scored[layer] for layer in sorted(self._scored)])
        layers, heads = lens.shape
        flat, pages = lens.flatten(), self._tables.tables(self._row).flatten(0, 1).long()
        # Waits for the device.
        longest = int(lens.max())
        stored_keys = of_all_layers([part.paged_keys for part in self._parts])
        stored_values = of_all_layers([part.paged_values for part in self._parts])
        keys = PagedEntries(self._cache.keys, pages, longest, flat, stored_keys)
        values = PagedEntries(self._cache.values, pages, longest, flat, stored_values)
        window = torch.stack([self._queries.pop(layer) for layer in range(layers)])
        if self._earlier is not None:
            window = torch.cat((self._earlier, window), dim=1)
        queries = window.transpose(1, 2).flatten(0, 1)
        observation = Observation(
            queries, keys, values, self._parts[0].scale, seen_tokens=self._command.tokens
        )
        scores = score_ragged(self._policy, observation, flat).scores
        return Scored(scores.view(layers, heads, -1), None)

    def _observe(self, layer: int, query: Tensor) -> list[Observation]:
        """Return an observation for each head as a cache of its own."""
        part, group = self._parts[layer], self._parts[layer].num_heads // self._tables.heads
        queries = window_queries(self._earlier, query[self._rows], self._command.query_span, layer)
        pages = self._tables.tables(self._row)[layer].long()
        keys = PagedEntries(self._cache.keys, pages, 0, quantization=part.paged_keys)
        values = PagedEntries(self._cache.values, pages, 0, quantization=part.paged_values)
        return [
            Observation(
                queries[head * group : (head + 1) * group],
                keys.head(head, entries),
                values.head(head, entries),
                part.scale,
                part.rotary,
                None if part.output_weight is None else _of_head(part.output_weight, head),
                part.layer,
                self._command.tokens,
                head,
            )
            for head, entries in enumerate(self._lens[layer])
        ]


class Recompression(Eviction):
    """Compression of the newest entries of a resumed request; those of earlier turns stay.

    All heads have as many new entries, so the policy selects among them as among a prompt's.
    Compressing earlier turns again with every turn would lose them (FlowKV, 2505.15347).
    """

    def __init__(self, *args: Any, among: int, **kwargs: Any) -> None:
        """
        Args:
            among: number of new entries in each head.
        """
        super().__init__(*args, **kwargs)
        self._among = among

    # New entries are as many in all heads, and selected as a prompt's.
    _at_once = False

    def _score(self, heads: list[Observation]) -> Scored:
        window = self._policy.scorer.window_tokens
        scored = [self._policy.score(head) for head in heads]
        new = self._among - window
        return Scored(
            torch.cat([one.scores[:, one.scores.shape[1] - new :] for one in scored]),
            _cat([one.weights[:, -new:] if new else one.weights[:, :0]
                  for one in scored if one.weights is not None]),
        )  # fmt: skip

    def _select(self) -> Tensor:
        lens, keep = self._tables.lens(self._row), self._command.keep
        shape = (*lens.shape, self._among)
        new = None
        if not self.failed:
            with self._contained:
                scored = stacked([self._scored[layer] for layer in sorted(self._scored)])
                new = self._policy.allocate(scored, keep).kept
        if new is None:
            self._scored.clear()
            self._earlier = None
            new = torch.zeros(shape, dtype=torch.bool, device=lens.device)
            new[..., self._among - keep :] = True
        position = torch.arange(int(lens.max()), device=lens.device)
        kept = torch.empty((*lens.shape, len(position)), dtype=torch.bool, device=lens.device)
        # Ages of all layers at once would take many times the memory of what is kept.
        for layer, begin in enumerate(lens.long() - self._among):
            age = position - begin[:, None]
            picked = new[layer].gather(1, age.clamp(0, self._among - 1))
            kept[layer] = (age < 0) | (picked & (age < self._among))
        return kept


def _cat(parts: list[Tensor]) -> Tensor | None:
    return torch.cat(parts) if parts else None


def _of_head(output_weight: Callable[[int], Tensor], head: int) -> Callable[[int], Tensor]:
    """Return the output weight of an observation that has one KV head only."""
    return lambda _: output_weight(head)
