"""Entries laid out in pages as an engine has them."""

import torch
from torch import Tensor

from kernels.paging.entries import PagedEntries


def in_pages(
    entries: Tensor, page_tokens: int, generator: torch.Generator, *, by_dimension: bool = False
) -> PagedEntries:
    """Put entries [H, n, D] into scattered pages; the rest of the last pages is NaN.

    Args:
        by_dimension: whether a page holds one dimension of all its entries after the other.
    """
    heads, n, dim = entries.shape
    width = -(-n // page_tokens)
    order = torch.randperm(heads * width, generator=generator)
    padded = torch.full((heads, width * page_tokens, dim), float("nan"), dtype=entries.dtype)
    padded[:, :n] = entries
    pool = torch.empty((heads * width, page_tokens, dim), dtype=entries.dtype)
    if by_dimension:
        pool = pool.transpose(1, 2).contiguous().transpose(1, 2)
    pool[order] = padded.view(heads * width, page_tokens, dim)
    return PagedEntries(pool, order.view(heads, width), n)
