"""Exact top-k as masks, with ties broken by position: the earlier entry is kept.

`torch.topk` and unstable sorts break ties as they please, and max-pooled scores tie often; a cache
hit and a cache miss must nevertheless select the same entries.
"""

import torch
from torch import Tensor


def top_mask_reference(scores: Tensor, count: int) -> Tensor:
    """Marks the `count` largest of scores [m]: a bool mask [m] with exactly `count` set."""
    order = scores.sort(descending=True, stable=True).indices
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask[order[:count]] = True
    return mask


def top_mask(scores: Tensor, count: int) -> Tensor:
    """`top_mask_reference` for each row of scores [..., m], by threshold instead of a full sort.

    Raises:
        ValueError: `count` is negative or above m.
    """
    m = scores.shape[-1]
    if not 0 <= count <= m:
        raise ValueError(f"cannot keep {count} of {m} entries")
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # Which entries topk returns at a tie is undefined, but the value at the cut is not.
    threshold = scores.topk(count, dim=-1, sorted=False).values.amin(dim=-1, keepdim=True)
    above = scores > threshold
    tied = scores == threshold
    missing = count - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= missing))
