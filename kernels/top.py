"""Exact top-k as masks, with ties broken by position: the earlier entry is kept.

`torch.topk` and unstable sorts break ties as they please, and max-pooled scores tie often; a cache
hit and a cache miss must nevertheless select the same entries.
"""

import torch
from torch import Tensor

from kernels.dispatch import Operation


@Operation
def top_mask(scores: Tensor, counts: Tensor) -> Tensor:
    """Marks the `counts` [...] largest in each row of scores [..., m]: a bool mask [..., m].

    Raises:
        ValueError: a count is negative or above m.
    """
    _check_counts(scores, counts)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = order.argsort(dim=-1)
    return rank < counts[..., None]


@top_mask.on("cpu")
def _top_mask_by_threshold(scores: Tensor, counts: Tensor) -> Tensor:
    _check_counts(scores, counts)
    most = int(counts.max())
    if most == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Which entries topk returns at a tie is undefined, but the value at the cut is not.
    best = scores.topk(most, dim=-1).values
    threshold = best.gather(-1, (counts - 1).clamp_(min=0)[..., None])
    above = scores > threshold
    tied = scores == threshold
    missing = counts[..., None] - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= missing))


def _check_counts(scores: Tensor, counts: Tensor) -> None:
    m = scores.shape[-1]
    if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= m:
        raise ValueError(f"cannot keep {counts.tolist()} of {m} entries")
