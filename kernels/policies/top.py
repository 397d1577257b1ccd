"""Exact top-k as masks; of equal scores the earlier entry is kept.

`torch.topk` and unstable sorts break ties in an undefined order, and max-pooled scores tie often.
A prefix hit and a miss must still select the same entries.
"""

import torch
from torch import Tensor

from adakv_serve.kernels.dispatch import Operation

# Larger rows are searched in parts: `torch.topk` and `torch.kthvalue` make copies several times
# the size of a row.
_AT_ONCE = 1 << 20


@Operation
def top_mask(scores: Tensor, counts: Tensor) -> Tensor:
    """Return a bool mask [..., m] of the `counts` [...] largest of each row of scores [..., m].

    Exactly `counts` entries are marked; NaN counts as negative infinity.

    Raises:
        ValueError: a count is negative or above m.
    """
    _check_counts(scores, counts)
    scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    rank = order.argsort(dim=-1)
    return rank < counts[..., None]


@top_mask.on("cpu")
def _top_mask_by_threshold(scores: Tensor, counts: Tensor) -> Tensor:
    _check_counts(scores, counts)
    if scores.numel() > _AT_ONCE:
        return _top_mask_by_row(scores, counts)
    most = int(counts.max()) if counts.numel() else 0
    if most == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    scores = scores.nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
    # At a tie the entries that topk returns are undefined; the value at the cut is defined.
    best = scores.topk(most, dim=-1).values
    threshold = best.gather(-1, (counts - 1).clamp_(min=0)[..., None])
    above = scores > threshold
    tied = scores == threshold
    missing = counts[..., None] - above.sum(dim=-1, keepdim=True)
    return above | (tied & (tied.cumsum(dim=-1) <= missing))


def _top_mask_by_row(scores: Tensor, counts: Tensor) -> Tensor:
    mask = torch.zeros(scores.shape, dtype=torch.bool)
    rows = scores.reshape(-1, scores.shape[-1]), mask.view(-1, scores.shape[-1])
    for row, marks, count in zip(*rows, counts.reshape(-1).tolist(), strict=True):
        if count == 0:
            continue
        threshold = _order_of_nth(row, count)
        missing = count
        for some, marked in zip(row.split(_AT_ONCE), marks.split(_AT_ONCE), strict=True):
            torch.gt(_ordered(some), threshold, out=marked)
            missing -= int(marked.sum())
        for some, marked in zip(row.split(_AT_ONCE), marks.split(_AT_ONCE), strict=True):
            places = (_ordered(some) == threshold).nonzero()[:missing, 0]
            marked[places] = True
            missing -= len(places)
    return mask


def _order_of_nth(row: Tensor, count: int) -> int:
    """Return the `count`-th largest of a row [m] in the integers of `_ordered`, by bisection."""
    low, high = -(2**31), 2**31 - 1
    while low < high:
        middle = (low + high + 1) // 2
        at_least = sum(int((_ordered(some) >= middle).sum()) for some in row.split(_AT_ONCE))
        low, high = (middle, high) if at_least >= count else (low, middle - 1)
    return low


def _ordered(scores: Tensor) -> Tensor:
    """Return 32-bit integers that are in the order of the scores."""
    # Adding zero turns negative zero into zero.
    bits = (
        scores.float()
        .nan_to_num(nan=float("-inf"), posinf=float("inf"), neginf=float("-inf"))
        .add_(0.0)
        .view(torch.int32)
    )
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _check_counts(scores: Tensor, counts: Tensor) -> None:
    m = scores.shape[-1]
    if counts.numel() and not 0 <= int(counts.min()) <= int(counts.max()) <= m:
        raise ValueError(f"cannot keep {counts.tolist()} of {m} entries")
