"""Entries laid out in pages as an engine has them."""

import torch
from torch import Tensor

from adakv_serve.kernels.paging.entries import PagedEntries, Quantization, read

# Formats whose entries have scales of their own: stored dtype, and the largest stored number.
WITH_SCALES = {
    "int8": (torch.int8, 127), "fp8": (torch.float8_e4m3fn, 448), "int4": (torch.uint8, 15),
}  # fmt: skip


def in_pages(
    entries: Tensor, page_tokens: int, generator: torch.Generator, *, by_dimension: bool = False
) -> PagedEntries:
    """Put entries [H, n, D] into scattered pages; the rest of the last pages is NaN or the highest.

    Args:
        by_dimension: whether a page holds one dimension of all its entries after the other.
    """
    heads, n, dim = entries.shape
    width = -(-n // page_tokens)
    order = torch.randperm(heads * width, generator=generator)
    nothing = float("nan") if entries.is_floating_point() else torch.iinfo(entries.dtype).max
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


def with_scales(
    entries: Tensor, form: str, page_tokens: int, generator: torch.Generator
) -> tuple[PagedEntries, Tensor]:
    """Put entries [H, n, D] into pages, each with its scale; return them, and what these store.

    Args:
        form: one of `WITH_SCALES`.
    """
    stored, most = WITH_SCALES[form]
    rotation = None
    if form == "int4":
        turn = torch.randn((entries.shape[-1],) * 2, generator=generator, dtype=torch.float64)
        rotation = torch.linalg.qr(turn).Q.float().to(entries.device)
        rows = _four_bits(entries.float() @ rotation.t())
    else:
        scales = entries.float().abs().amax(dim=-1, keepdim=True) / most
        numbers = entries.float() / scales
        numbers = (numbers.round() if form == "int8" else numbers).to(stored)
        rows = torch.cat((numbers.view(torch.uint8), scales.view(torch.uint8)), dim=-1)
    pool = rows.view(torch.int8) if form == "int8" else rows
    paged = in_pages(pool, page_tokens, generator)
    quantization = Quantization(stored, None, entries.dtype, rotation)
    paged = paged._replace(quantization=quantization)
    return paged, read(paged)


def _four_bits(entries: Tensor) -> Tensor:
    """Return rows [H, n, D / 2 + 4]: numbers of four bits, and a scale that also has their zero."""
    least, most = entries.aminmax(dim=-1, keepdim=True)
    scales = (most - least) / 15
    zeros = (-least / scales).round().clamp(0, 15)
    numbers = (entries / scales + zeros).round().clamp(0, 15).to(torch.uint8)
    pairs = numbers[..., ::2] | numbers[..., 1::2] << 4
    bits = scales.view(torch.int32) & ~0xF | zeros.int()
    return torch.cat((pairs, bits.view(torch.uint8)), dim=-1)
