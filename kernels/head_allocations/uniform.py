from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.top import top_mask


@dataclass(frozen=True)
class UniformHeads:
    """Every head of the layer keeps equally many entries, each its own best."""

    def allocate(self, scores: Tensor, total: int) -> Tensor:
        """Marks `total` of scores [H, m]; a remainder goes one each to the first heads."""
        heads = scores.shape[0]
        each, extra = divmod(total, heads)
        if extra == 0:
            return top_mask(scores, each)
        return torch.cat((top_mask(scores[:extra], each + 1), top_mask(scores[extra:], each)))
