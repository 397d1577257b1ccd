from dataclasses import dataclass

from torch import Tensor

from adakv_serve.kernels.policies.top import top_mask
from adakv_serve.kernels.transfer import sent


@dataclass(frozen=True)
class AdaptiveHeads:
    """Ada-KV (2407.11550): a floor for each head, then one top-k over all heads of the layer.

    Each head keeps its best `alpha * total / H` entries; the best entries of all heads fill the
    total. This lowers the upper bound of the L1 loss of the attention output against uniform heads.
    FFY0/AdaKV blends both allocations and rounds, so that its totals drift; here the total is
    exact. The floor is kvpress' safeguard without the window.

    alpha: share of the even allocation that each head keeps at least, 0 to 1.
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
