from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class PyramidLayers:
    """PyramidKV (2406.02069): linearly fewer entries from the first layer to the last.

    The last layer gets 1/beta of the mean and the first as much more; where that exceeds the
    prompt, the first is clipped to it and the slope flattens, so that the mean holds. Unlike the
    authors' floor division, the sum over the layers is exact.
    """

    needs_scores: ClassVar[bool] = False
    beta: float = 20.0

    def totals(
        self, shape: tuple[int, int, int], quota: int, scores: Tensor | None = None
    ) -> list[int]:
        layers, heads, m = shape
        if layers == 1:
            return [heads * quota]
        top = min(2 * quota - quota / self.beta, m)
        step = 2 * (top - quota) / (layers - 1)
        means = _rounded([top - layer * step for layer in range(layers)], layers * quota)
        return [heads * mean for mean in means]


def _rounded(values: list[float], total: int) -> list[int]:
    """Integers next to `values` that sum to `total`; the largest remainders are rounded up."""
    # The shift keeps a whole number whole when its float lies a rounding error below it.
    floors = [int(value + 1e-9) for value in values]
    by_remainder = sorted(range(len(values)), key=lambda i: (floors[i] - values[i], i))
    for index in by_remainder[: total - sum(floors)]:
        floors[index] += 1
    return floors
