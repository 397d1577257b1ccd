"""Norms of values in the layer's output, and a second selection by them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from adakv_serve.kernels.paging.entries import one_head, parts
from adakv_serve.kernels.policies.attention import row_products
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.top import top_mask


def projected_value_norms(observation: Observation) -> Tensor:
    """Return [H, n] float32: the mean over the query group of the L1 norm of W_o,head @ v.

    It multiplies in the values' dtype, a part of a head's values at a time.

    Raises:
        ValueError: the observation has no output projection.
    """
    if observation.output_weight is None:
        raise ValueError("the policy needs the layer's output projection")
    values, group = observation.values, observation.group_size
    heads, n, dim = values.shape
    norms = torch.zeros((heads, n), dtype=torch.float32, device=values.device)
    for head in range(heads):
        weight = observation.output_weight(head).to(values.dtype)
        members = [columns.contiguous() for columns in weight.split(dim, dim=1)]
        for first, part in parts(one_head(values, head), bytes_per_entry=4 * len(weight)):
            mine = norms[head, first : first + part.shape[1]]
            for columns in members:
                projected = row_products(part[0], columns)
                mine += projected.abs_().sum(dim=-1, dtype=torch.float32)
    return norms.div_(group)


@dataclass(frozen=True)
class ProjectedValues:
    """Second stage of CriticalKV (2502.03805), as kvpress' CriticalAdaKVPress computes it.

    The first selection fixes how many entries each head keeps. Scores alone choose the first share
    of them; score times norm of the projected value chooses the rest.

    first_stage_ratio: share that scores alone choose.
    epsilon: added to each score, so that the norm also ranks entries without attention.
    """

    first_stage_ratio: float = 0.5
    epsilon: float = 1e-4

    def weights(self, observation: Observation, candidates: int) -> Tensor:
        """Return the norms [H, m] of the first `candidates` entries."""
        return projected_value_norms(observation)[:, :candidates]

    def reselect(self, kept: Tensor, scores: Tensor, weights: Tensor) -> Tensor:
        """Return a mask [K, H, m] of other entries, as many for each head as in `kept`.

        Args:
            kept: first selection [K, H, m].
            scores: [K, H, m].
            weights: [K, H, m], see `weights`.
        """
        counts = kept.sum(dim=-1)
        first = (counts * self.first_stage_ratio).long()
        secured = top_mask(scores, first)
        worth = ((scores + self.epsilon) * weights).masked_fill(secured, float("-inf"))
        return secured | top_mask(worth, counts - first)
