from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class UniformLayers:
    """Every layer keeps equally many entries."""

    def totals(self, scores: Tensor, quota: int) -> list[int]:
        """Entries to keep in each layer of scores [L, H, m], `quota` for each head on average."""
        layers, heads, _ = scores.shape
        return [heads * quota] * layers
