"""Exact top-k masks by radix select: four passes of eight bits, ties by position."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adakv_serve.kernels.policies.top import top_mask

_TILE = 1024
_PROGRAMS = 1024
_DIGITS = 256


@top_mask.on("cuda")
def radix_top_mask(scores: Tensor, counts: Tensor) -> Tensor:
    """Return what `kernels.policies.top.top_mask` gives.

    Counts are not checked: that would wait for the device.
    """
    m = scores.shape[-1]
    mask = torch.empty(scores.shape, dtype=torch.bool, device=scores.device)
    if scores.numel() == 0:
        return mask
    flat = scores.float().contiguous().view(-1, m)
    rows = flat.shape[0]
    tiles = triton.cdiv(m, _TILE)
    splits = max(1, min(tiles, _PROGRAMS // rows))
    span = triton.cdiv(tiles, splits) * _TILE
    grid = (rows, splits)
    prefix = torch.zeros(rows, dtype=torch.int32, device=flat.device)
    left = counts.reshape(-1).to(torch.int32, copy=True)
    histogram = torch.zeros((rows, _DIGITS), dtype=torch.int32, device=flat.device)
    for shift in (24, 16, 8, 0):
        _count_digits[grid](flat, prefix, histogram, m, span, SHIFT=shift, TILE=_TILE)
        _choose_digit[(rows,)](histogram, prefix, left, SHIFT=shift)
    ties = torch.empty((rows, splits), dtype=torch.int32, device=flat.device)
    _count_ties[grid](flat, prefix, ties, m, span, splits, TILE=_TILE)
    before = (ties.cumsum(dim=1) - ties).to(torch.int32)
    _mark[grid](flat, prefix, left, before, mask, m, span, splits, TILE=_TILE)
    return mask


@triton.jit
def _load_ordered(scores, row, m, position):
    """Return scores as unsigned integers of the same order; NaN comes last."""
    value = tl.load(scores + row.to(tl.int64) * m + position, mask=position < m, other=0.0)
    value = tl.where(value == value, value, float("-inf"))
    # Negative zero equals zero.
    bits = tl.where(value == 0.0, 0.0, value).to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, bits ^ 0xFFFFFFFF, bits | 0x80000000)


@triton.jit
def _count_digits(
    scores, prefix, histogram, m, span, SHIFT: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Count the next digit of the scores that begin with the row's prefix."""
    row, start = tl.program_id(0), tl.program_id(1) * span
    wanted = tl.load(prefix + row).to(tl.uint32, bitcast=True)
    digits = tl.arange(0, 256)
    counts = tl.zeros([256], tl.int32)
    for tile in range(start, min(start + span, m), TILE):
        position = tile + tl.arange(0, TILE)
        ordered = _load_ordered(scores, row, m, position)
        matches = position < m
        if SHIFT < 24:
            matches = matches & (ordered >> (SHIFT + 8) == wanted >> (SHIFT + 8))
        digit = ((ordered >> SHIFT) & 0xFF).to(tl.int32)
        counts += tl.histogram(digit, 256, mask=matches)
    tl.atomic_add(histogram + row * 256 + digits, counts, mask=counts > 0)


@triton.jit
def _choose_digit(histogram, prefix, left, SHIFT: tl.constexpr):
    """Extend the prefix by the digit of the last kept score, and empty the histogram."""
    row = tl.program_id(0)
    digits = tl.arange(0, 256)
    counts = tl.load(histogram + row * 256 + digits)
    missing = tl.load(left + row)
    at_least = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
    digit = tl.sum((at_least >= missing).to(tl.int32), 0) - 1
    above = tl.sum(tl.where(digits > digit, counts, 0), 0)
    tl.store(left + row, missing - above)
    known = tl.load(prefix + row).to(tl.uint32, bitcast=True)
    chosen = known | (digit.to(tl.uint32) << SHIFT)
    tl.store(prefix + row, chosen.to(tl.int32, bitcast=True))
    tl.store(histogram + row * 256 + digits, tl.zeros([256], tl.int32))


@triton.jit(do_not_specialize=["splits"])
def _count_ties(scores, prefix, ties, m, span, splits, TILE: tl.constexpr):
    row, split = tl.program_id(0), tl.program_id(1)
    start = split * span
    threshold = tl.load(prefix + row).to(tl.uint32, bitcast=True)
    count = tl.zeros([TILE], tl.int32)
    for tile in range(start, min(start + span, m), TILE):
        position = tile + tl.arange(0, TILE)
        ordered = _load_ordered(scores, row, m, position)
        count += ((ordered == threshold) & (position < m)).to(tl.int32)
    tl.store(ties + row * splits + split, tl.sum(count, 0))


@triton.jit(do_not_specialize=["splits"])
def _mark(
    scores, prefix, left, before, mask, m, span, splits, TILE: tl.constexpr
):  # fmt: skip
    """Mark all scores above the threshold, then the first ones equal to it up to the count."""
    row, split = tl.program_id(0), tl.program_id(1)
    start = split * span
    threshold = tl.load(prefix + row).to(tl.uint32, bitcast=True)
    room = tl.load(left + row) - tl.load(before + row * splits + split)
    for tile in range(start, min(start + span, m), TILE):
        position = tile + tl.arange(0, TILE)
        is_entry = position < m
        ordered = _load_ordered(scores, row, m, position)
        tied = ((ordered == threshold) & is_entry).to(tl.int32)
        kept = (ordered > threshold) | ((tied == 1) & (tl.cumsum(tied, 0) <= room))
        tl.store(mask + row.to(tl.int64) * m + position, kept, mask=is_entry)
        room -= tl.sum(tied, 0)
