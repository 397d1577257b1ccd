from dataclasses import dataclass

from torch import Tensor

from kernels.policies.top import top_mask
from kernels.transfer import sent


@dataclass(frozen=True)
class UniformHeads:
    """Every head of the layer keeps equally many entries, each its own best."""

    def allocate(self, scores: Tensor, totals: list[int]) -> Tensor:
        # A remainder goes one each to the first heads.
        heads = scores.shape[1]
        counts = [[total // heads + (h < total % heads) for h in range(heads)] for total in totals]
        return top_mask(scores, sent(counts, scores.device))
