from dataclasses import dataclass

from torch import Tensor

from adakv_serve.kernels.policies.top import top_mask
from adakv_serve.kernels.transfer import sent


@dataclass(frozen=True)
class UniformHeads:
    """The same number of entries for each head of the layer: its best."""

    def allocate(self, scores: Tensor, totals: list[int]) -> Tensor:
        # The first heads get one more each if the total is no multiple of the heads.
        heads = scores.shape[1]
        counts = [[total // heads + (h < total % heads) for h in range(heads)] for total in totals]
        return top_mask(scores, sent(counts, scores.device))
