"""Exact top-k as masks, with ties broken by position: the earlier entry is kept.

`torch.topk` and unstable sorts break ties as they please, and max-pooled scores tie often; a cache
hit and a cache miss must nevertheless select the same entries.
"""

import torch
from torch import Tensor

from kernels.dispatch import Operation

# Rows of more scores are looked through a part at a time: `torch.topk` and `torch.kthvalue` make
# copies several times as large as a row.
_AT_ONCE = 1 << 20


@Operation
def top_mask(scores: Tensor, counts: Tensor) -> Tensor:
    """Mark the `counts` [...] largest in each row of scores [..., m]: a bool mask [..., m].

    Exactly as many, whatever the scores are: what is no number counts as negative infinity.

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
    # Which entries topk returns at a tie is undefined, but the value at the cut is not.
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
            # The first of those that tie.
            places = (_ordered(some) == threshold).nonzero()[:missing, 0]
            marked[places] = True
            missing -= len(places)
    return mask


def _order_of_nth(row: Tensor, count: int) -> int:
    """Return the `count`-th largest of a row [m], as `_ordered` has it: bisection by counting."""
    low, high = -(2**31), 2**31 - 1
    while low < high:
        middle = (low + high + 1) // 2
        at_least = sum(int((_ordered(some) >= middle).sum()) for some in row.split(_AT_ONCE))
        low, high = (middle, high) if at_least >= count else (low, middle - 1)
    return low


def _ordered(scores: Tensor) -> Tensor:
    """Return integers of 32 bits in the order of the scores."""
    # The sum makes negative zero equal to zero.
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
