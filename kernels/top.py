"""Exact top-k as masks, with ties broken by position: the earlier entry is kept.

`torch.topk` and unstable sorts break ties as they please, and max-pooled scores tie often; a cache
hit and a cache miss must nevertheless select the same entries.
"""

import torch
from torch import Tensor

from kernels.dispatch import Operation


@Operation
def top_mask(scores: Tensor, count: int) -> Tensor:
    """Marks the `count` largest in each row of scores [..., m]: a bool mask of the same shape.

    Raises:
        ValueError: `count` is negative or above m.
    """
    _check_count(scores, count)
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order[..., :count], True)


@top_mask.on("cpu")
def _top_mask_by_threshold(scores: Tensor, count: int) -> Tensor:
    _check_count(scores, count)
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Which entries topk returns at a tie is undefined, but the value at the cut is not.
    threshold = scores.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above = scores > threshold
    tied = scores == threshold
    missing = count - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= missing))


def _check_count(scores: Tensor, count: int) -> None:
    m = scores.shape[-1]
    if not 0 <= count <= m:
        raise ValueError(f"cannot keep {count} of {m} entries")
