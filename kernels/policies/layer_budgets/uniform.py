from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class UniformLayers:
    """The same number of entries for each layer."""

    needs_scores: ClassVar[bool] = False

    def totals(
        self, shape: tuple[int, int, int], quota: int, scores: Tensor | None = None
    ) -> list[int]:
        layers, heads, _ = shape
        return [heads * quota] * layers
