"""Entries laid out in pages as an engine has them."""

import torch
from torch import Tensor

from adakv_serve.kernels.paging.entries import PagedEntries, Quantization


def in_pages(
    entries: Tensor, page_tokens: int, generator: torch.Generator, *, by_dimension: bool = False
) -> PagedEntries:
    """Put entries [H, n, D] into scattered pages; the rest of the last pages is NaN or 255.

    Args:
        by_dimension: whether a page holds one dimension of all its entries after the other.
    """
    heads, n, dim = entries.shape
    width = -(-n // page_tokens)
    order = torch.randperm(heads * width, generator=generator)
    nothing = float("nan") if entries.is_floating_point() else 255
    padded = torch.full((heads, width * page_tokens, dim), nothing, dtype=entries.dtype)
    padded[:, :n] = entries
    pool = torch.empty((heads * width, page_tokens, dim), dtype=entries.dtype)
    if by_dimension:
        pool = pool.transpose(1, 2).contiguous().transpose(1, 2)
    pool[order] = padded.view(heads * width, page_tokens, dim)
    return PagedEntries(pool, order.view(heads, width), n)


def in_bytes(
    entries: Tensor,
    stored: torch.dtype,
    scales: Tensor,
    page_tokens: int,
    generator: torch.Generator,
    *,
    by_dimension: bool = False,
) -> tuple[PagedEntries, Tensor]:
    """Put entries [H, n, D] into pages of bytes; return them, and the numbers that these store.

    Args:
        scales: [H] float32.
    """
    numbers = (entries / scales[:, None, None]).to(stored)
    paged = in_pages(numbers.view(torch.uint8), page_tokens, generator, by_dimension=by_dimension)
    quantization = Quantization(stored, scales, entries.dtype)
    read = numbers.to(entries.dtype) * scales.to(entries.dtype)[:, None, None]
    return paged._replace(quantization=quantization), read
