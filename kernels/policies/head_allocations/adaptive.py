from dataclasses import dataclass

from torch import Tensor

from kernels.policies.top import top_mask
from kernels.transfer import sent


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

    def allocate(self, scores: Tensor, totals: list[int]) -> Tensor:
        layers, heads, _ = scores.shape
        floors = [int(self.alpha * total / heads) for total in totals]
        rest = [total - floor * heads for total, floor in zip(totals, floors, strict=True)]
        device = scores.device
        secured = top_mask(scores, sent(floors, device)[:, None].expand(-1, heads))
        others = scores.masked_fill(secured, float("-inf")).view(layers, -1)
        return secured | top_mask(others, sent(rest, device)).view_as(scores)
