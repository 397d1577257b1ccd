"""Input of a scorer: one layer of one request after its prefill, or while it decodes."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from adakv_serve.kernels.paging.entries import Entries
from adakv_serve.kernels.policies.rotary import Rotary


class Observation(NamedTuple):
    """One layer's cache and the queries of the last positions: H heads, G query heads for each.

    queries: [H * G, s, D] of the last s positions, after RoPE, in head order.
    keys: [H, n, D] of all n entries, after RoPE.
    values: [H, n, D] of all n entries.
    scale: softmax scale, usually D ** -0.5.
    rotary: rotation of the model, for scorers that need queries at other positions; None if the
        model has none.
    output_weight: function from a head to its columns [hidden, G * D] of the output projection,
        for scorers that project values. A function, because engines repack weights.
    layer: index of the layer in the model, for scorers that draw random numbers.
    seen_tokens: position after the last query, where entries have been evicted; None where none
        have.
    first_head: index of the first head in the layer, for scorers that draw random numbers.
    """

    queries: Tensor
    keys: Entries
    values: Entries
    scale: float
    rotary: Rotary | None = None
    output_weight: Callable[[int], Tensor] | None = None
    layer: int = 0
    seen_tokens: int | None = None
    first_head: int = 0

    @property
    def num_kv_heads(self) -> int:
        return self.keys.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[1]

    @property
    def next_position(self) -> int:
        """Return the position of the next token."""
        return self.num_tokens if self.seen_tokens is None else self.seen_tokens

    @property
    def group_size(self) -> int:
        return self.queries.shape[0] // self.num_kv_heads

    def grouped_queries(self, last: int) -> Tensor:
        """Return the last `last` queries as [H, G, last, D].

        Raises:
            ValueError: there are fewer queries.
        """
        heads, span, dim = self.queries.shape
        if last > span:
            raise ValueError(f"the scorer needs {last} queries, {span} were captured")
        return self.queries[:, span - last :].reshape(
            self.num_kv_heads, heads // self.num_kv_heads, last, dim
        )
