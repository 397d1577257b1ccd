"""Compressed requests of one step, folded: each (request, KV head) is a sequence of its own."""

from typing import NamedTuple

from torch import Tensor

from adakv_serve.kernels.paging.growth import ExtendedStep, GrownStep
from adakv_worker.attention.watcher import Watcher


class Pages(NamedTuple):
    """The whole KV memory, in the shape of the kernels' caches of one KV head.

    keys, values: [pages, 1, page_tokens, D] on CPU, [pages, page_tokens, 1, D] on CUDA. If a scale
        follows each entry's numbers, the bytes of both stand in place of D.
    kv_cache_dtype: vLLM's name of how they store numbers.
    key_scales, value_scales: [pages, page_tokens, 1] float32, the scales of entries; None without.
    scale: [1] float32, with which all stored numbers are multiplied; None for the layer's scales.
    """

    keys: Tensor
    values: Tensor
    kv_cache_dtype: str = "auto"
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None
    scale: Tensor | None = None


class Folded(NamedTuple):
    """Compressed requests of one step that attend in one call, R requests of H KV heads each.

    In a CUDA graph R is the whole batch: the folded call and the stock call both attend for all
    rows, and `mask` selects between them.

    first: the batch's token with which they begin. tokens: their number in the batch.
    query_start_loc: [R * H + 1] int32.
    most_tokens: most tokens that one of them has in this step.
    order: [tokens * H] int64, the pairs of token and head in the order of request, head and token;
        None where each request has one token.
    plan: the backend's own preparation of the step.
    mask: [R] bool, the compressed rows; None outside a graph.
    queries: [L, R, Hq, D], where a graph leaves all rows' queries for the step's watchers.
    """

    requests: int
    grown: GrownStep | ExtendedStep
    pages: Pages
    query_start_loc: Tensor
    first: int
    tokens: int
    most_tokens: int = 1
    order: Tensor | None = None
    plan: object = None
    mask: Tensor | None = None
    queries: Tensor | None = None

    @property
    def most_entries(self) -> int:
        """The most entries that a sequence can have, on CUDA; only the device has their number."""
        return self.grown.tables.shape[-1] * self.pages.keys.shape[1]

    @property
    def rows(self) -> slice:
        """Their tokens in the batch."""
        return slice(self.first, self.first + self.tokens)


class Step(NamedTuple):
    """Our additions to a step's attention metadata.

    decodes: the compressed requests with one token. extends: those with several.
    """

    decodes: Folded | None
    watchers: list[Watcher]
    extends: Folded | None = None

    @property
    def folded(self) -> list[Folded]:
        return [folded for folded in (self.decodes, self.extends) if folded is not None]

    @property
    def stock_row(self) -> int:
        """The batch's first request for the stock call."""
        return sum(folded.requests for folded in self.folded if folded.mask is None)

    @property
    def stock_token(self) -> int:
        """The batch's first token for the stock call."""
        return sum(folded.tokens for folded in self.folded if folded.mask is None)
