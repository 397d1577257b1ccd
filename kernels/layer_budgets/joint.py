from dataclasses import dataclass

from torch import Tensor

from kernels.top import top_mask


@dataclass(frozen=True)
class JointLayers:
    """KV-Compress (2410.00161): one top-k over all layers and heads decides each layer's share."""

    def totals(self, scores: Tensor, quota: int) -> list[int]:
        """Entries to keep in each layer of scores [L, H, m], `quota` for each head on average."""
        layers, heads, _ = scores.shape
        kept = top_mask(scores.flatten(), layers * heads * quota)
        return [int(count) for count in kept.view(layers, -1).sum(dim=-1)]
