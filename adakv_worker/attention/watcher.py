"""The object that a forward pass hands its keys and queries to."""

from typing import Protocol

from torch import Tensor


class Watcher(Protocol):
    """Sees each layer of a forward pass: a capture of queries, a compression or an eviction."""

    def see(self, layer: int, query: Tensor) -> None:
        """Read what a layer has attended with; the backend calls this after each layer.

        Args:
            layer: its index in the cache.
            query: [tokens, Hq, D] of the whole batch, after RoPE.
        """
        ...
