from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor


@dataclass(frozen=True)
class PyramidLayers:
    """PyramidKV (2406.02069): linearly fewer entries from the first layer to the last.

    The last layer gets mean / beta, the first 2 * mean - mean / beta. If that exceeds the prompt,
    the first layer gets the prompt and the slope flattens, so that the mean stays. The authors
    divide with a floor; here the sum over the layers is exact.

    beta: ratio of the mean to the last layer's entries.
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
    """Return `values` as integers that sum to `total`; the largest remainders round up."""
    # The shift keeps an integer whose float is a rounding error too small.
    floors = [int(value + 1e-9) for value in values]
    by_remainder = sorted(range(len(values)), key=lambda i: (floors[i] - values[i], i))
    for index in by_remainder[: total - sum(floors)]:
        floors[index] += 1
    return floors
