from dataclasses import dataclass

from torch import Tensor

from kernels.top import top_mask


@dataclass(frozen=True)
class AdaptiveHeads:
    """Ada-KV (2407.11550): one joint top-k over all heads of the layer, above a floor for each.

    Lowers the upper bound of the L1 loss of the attention output against uniform heads. First each
    head's best `alpha * total / H` entries are taken, then the best of all the rest. (FFY0/AdaKV
    blends the two allocations and rounds, so that its totals drift; the floor here is kvpress'
    safeguard without the window, and the total is exact.)

    alpha: share of the even allocation that every head is sure of, 0 to 1.
    """

    alpha: float = 0.2

    def allocate(self, scores: Tensor, total: int) -> Tensor:
        """Marks exactly `total` of scores [H, m]."""
        heads = scores.shape[0]
        floor = int(self.alpha * total / heads)
        secured = top_mask(scores, floor)
        rest = scores.masked_fill(secured, float("-inf")).flatten()
        joint = top_mask(rest, total - floor * heads)
        return secured | joint.view_as(scores)
