"""What a value is worth to the layer's output, and a second selection by it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.observation import Observation
from kernels.top import top_mask

# Of projected values at a time: a long prompt's together would be gigabytes.
_ELEMENTS = 1 << 26


def projected_value_norms(observation: Observation) -> Tensor:
    """Mean over the query group of the L1 norm of W_o,head @ v: [H, n] float32.

    Multiplied in the values' dtype.

    Raises:
        ValueError: the observation has no output projection.
    """
    if observation.output_weight is None:
        raise ValueError("the policy needs the layer's output projection")
    heads, group = observation.num_kv_heads, observation.group_size
    values = observation.values
    weight = observation.output_weight().to(values.dtype)
    slices = weight.reshape(weight.shape[0], heads, group, values.shape[-1])
    norms = torch.zeros(values.shape[:2], dtype=torch.float32, device=values.device)
    at_once = max(1, _ELEMENTS // (heads * len(weight)))
    for start in range(0, values.shape[1], at_once):
        part = slice(start, start + at_once)
        for member in range(group):
            projected = torch.einsum("hnd,ohd->hno", values[:, part], slices[:, :, member])
            norms[:, part] += projected.abs_().sum(dim=-1, dtype=torch.float32)
    return norms / group


@dataclass(frozen=True)
class ProjectedValues:
    """CriticalKV's second stage (2502.03805, as kvpress' CriticalAdaKVPress does it).

    The plain scores decide how many entries each head keeps, and fill a first share of them; the
    rest of the head goes by score times the norm of the projected value.

    first_stage_ratio: the share that the plain scores fill.
    epsilon: added to the score, so that the value's norm counts for unattended entries too.
    """

    first_stage_ratio: float = 0.5
    epsilon: float = 1e-4

    def weights(self, observation: Observation, candidates: int) -> Tensor:
        """Norms [H, m] of the first `candidates` entries."""
        return projected_value_norms(observation)[:, :candidates]

    def reselect(self, kept: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
        """Other entries for kept [K, H, m], as many for each head."""
        counts = kept.sum(dim=-1)
        first = (counts * self.first_stage_ratio).long()
        secured = top_mask(scores, first)
        worth = ((scores + self.epsilon) * weights).masked_fill(secured, float("-inf"))
        return secured | top_mask(worth, counts - first)
