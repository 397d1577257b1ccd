from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from adakv_serve.kernels.policies.top import top_mask
from adakv_serve.kernels.transfer import sent


@dataclass(frozen=True)
class JointLayers:
    """KV-Compress (2410.00161): one top-k over all layers and heads gives each layer's share."""

    needs_scores: ClassVar[bool] = True

    def totals(
        self, shape: tuple[int, int, int], quota: int, scores: Tensor | None = None
    ) -> list[int]:
        if scores is None:
            raise ValueError("joint layers need the scores of all layers")
        layers, heads, _ = shape
        count = sent(layers * heads * quota, scores.device)
        kept = top_mask(scores.flatten(), count)
        totals: list[int] = kept.view(layers, -1).sum(dim=-1).tolist()
        return totals
