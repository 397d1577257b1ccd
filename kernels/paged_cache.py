"""Reading prompts from blocks and writing kept entries into pages, as plain tensor operations."""

from typing import NamedTuple

import torch
from torch import Tensor

from kernels.dispatch import Operation
from kernels.pages import PageLayout


class PagedCache(NamedTuple):
    """All KV memory of an engine as pages, whatever order its kernels pack a page in.

    keys, values: [pages, page_tokens, D], views into the engine's memory.
    """

    keys: Tensor
    values: Tensor


def read_blocks(
    pool: Tensor, layout: PageLayout, blocks: Tensor, layer: int, num_tokens: int
) -> Tensor:
    """Copies one layer of an uncompressed request's keys or values: [H, num_tokens, D]."""
    pages = layout.block_pages(blocks, layer).t().reshape(-1)
    heads, dim = layout.offsets.shape[1], pool.shape[-1]
    if pool.stride(1) == 1:
        # Packed dimension-major: gathered as it lies, and only then turned.
        packed = pool.transpose(1, 2).index_select(0, pages).view(heads, -1, dim, pool.shape[1])
        return packed.transpose(2, 3).reshape(heads, -1, dim)[:, :num_tokens]
    return pool.index_select(0, pages).view(heads, -1, dim)[:, :num_tokens]


def write_slots(cache: PagedCache, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Writes entries [e, D] to slots [e] (page id * page_tokens + offset)."""
    page_tokens = cache.keys.shape[1]
    page, offset = slots // page_tokens, slots % page_tokens
    cache.keys[page, offset] = keys
    cache.values[page, offset] = values


def read_slots(cache: PagedCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Copies entries at slots [e]: keys and values [e, D]."""
    page_tokens = cache.keys.shape[1]
    page, offset = slots // page_tokens, slots % page_tokens
    return cache.keys[page, offset], cache.values[page, offset]


@Operation
def compact(kept: Tensor, cache: PagedCache, source: Tensor, tables: Tensor, lens: Tensor) -> None:
    """Copies the entries of K layers that stay, in order of position.

    Args:
        kept: [K, H, n] bool.
        source: [K, nb, H] int64, the pages that hold them.
        tables, lens: [K, H, W] int32 and [K, H], the pages that shall.
    """
    page_tokens = cache.keys.shape[1]
    for k, head in torch.cartesian_prod(*map(torch.arange, kept.shape[:2])).tolist():
        for entry, position in enumerate(kept[k, head].nonzero()[:, 0].tolist()):
            old = source[k, position // page_tokens, head], position % page_tokens
            new = tables[k, head, entry // page_tokens].long(), entry % page_tokens
            cache.keys[new] = cache.keys[old]
            cache.values[new] = cache.values[old]


@compact.on("cpu")
def _compact_at_once(
    kept: Tensor, cache: PagedCache, source: Tensor, tables: Tensor, lens: Tensor
) -> None:
    page_tokens = cache.keys.shape[1]
    k, head, position = kept.nonzero(as_tuple=True)
    slots = source[k, position // page_tokens, head] * page_tokens + position % page_tokens
    targets = placed_slots(tables.flatten(0, 1), lens.flatten(), page_tokens)
    write_slots(cache, targets, *read_slots(cache, slots))


def placed_slots(tables: Tensor, lens: Tensor, page_tokens: int) -> Tensor:
    """Slots [sum of lens] of all entries of heads with page tables [H, W], head after head."""
    lens = lens.long()
    head = torch.repeat_interleave(torch.arange(lens.numel()), lens)
    position = torch.arange(int(lens.sum())) - (lens.cumsum(0) - lens)[head]
    return tables[head, position // page_tokens].long() * page_tokens + position % page_tokens
