"""Simulated pages of few bits: what stays of a prompt, rounded, in pages of full precision.

It shows what a format costs in quality on machines whose attention kernels do not read it. The
formats are those of vLLM's caches with scales beside their entries. An answer's own entries stay
exact.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from adakv_serve.kernels.paging.paged_cache import (
    PagedCache,
    compact,
    kept_slots,
    read_slots,
    write_slots,
)

# Least scale, for entries of zeros.
_LEAST = 1e-6


class Rounding(NamedTuple):
    """A format with a scale for each entry of each head.

    bits: of a number.
    apply: returns entries [n, D] as the format would give them back.
    """

    bits: int
    apply: Callable[[Tensor], Tensor]


def int8(entries: Tensor) -> Tensor:
    """Return entries [n, D] rounded to 255 steps on both sides of zero."""
    scales = (entries.abs().amax(-1, keepdim=True) / 127).clamp(min=_LEAST)
    return (entries / scales).round() * scales


def int4(entries: Tensor) -> Tensor:
    """Return entries [n, D] rounded to 16 steps between least and largest number, after a rotation.

    The rotation spreads large dimensions over all others, as QuaRot's does (arXiv 2404.00456).
    """
    rotation = _rotation(entries.shape[-1]).to(entries)
    rotated = entries @ rotation
    least, most = rotated.aminmax(dim=-1, keepdim=True)
    scales = ((most - least) / 15).clamp(min=_LEAST)
    zero = (-least / scales).round()
    steps = ((rotated / scales).round() + zero).clamp(0, 15)
    return ((steps - zero) * scales) @ rotation.T


def _rotation(dim: int) -> Tensor:
    """Return a random Hadamard rotation [D, D], the same at each call.

    Raises:
        ValueError: D is no power of two.
    """
    if dim & (dim - 1):
        raise ValueError(f"a Hadamard matrix needs a power of two, and heads have {dim} numbers")
    rotation = torch.ones(1, 1)
    while len(rotation) < dim:
        rotation = torch.cat([torch.cat([rotation, rotation], 1),
                              torch.cat([rotation, -rotation], 1)])  # fmt: skip
    signs = torch.randint(0, 2, (dim, 1), generator=torch.Generator().manual_seed(0)) * 2 - 1
    return signs * rotation / dim**0.5


ROUNDINGS = {"int8": Rounding(8, int8), "int4": Rounding(4, int4)}


@contextlib.contextmanager
def rounded_pages(rounding: Rounding) -> Iterator[None]:
    """Within the context, round what compaction on a CPU keeps of prompts."""

    def rounded(
        kept: Tensor, cache: PagedCache, source: Tensor, tables: Tensor, lens: Tensor
    ) -> None:
        slots, targets = kept_slots(kept, cache, source, tables, lens)
        write_slots(cache, targets, *map(rounding.apply, read_slots(cache, slots)))

    before = compact.path("cpu")
    compact.on("cpu")(rounded)
    try:
        yield
    finally:
        compact.on("cpu")(before)
