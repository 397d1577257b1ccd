"""Reads of prompts from blocks and writes of kept entries into pages, as tensor operations."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from adakv_serve.kernels.dispatch import Operation

_MOVED_PAGES = 64
# Bytes of keys and values that are held at a time, in memory outside the budget: those that a
# compaction on a CPU copies, and pages on their way to the host's memory and back.
_COPIED_BYTES = 16 << 20


class PagedCache(NamedTuple):
    """All KV memory of an engine as pages in logical order, for any packing of its kernels.

    keys, values: [pages, page_tokens, D], views into the engine's memory.
    """

    keys: Tensor
    values: Tensor

    @property
    def packing(self) -> str:
        """Name of the order in a page: caches of the same packing can exchange whole pages."""
        return ", ".join(
            f"{name} by {'token' if pool.stride(2) == 1 else 'dimension'}"
            for name, pool in zip(self._fields, self, strict=True)
        )


def read_heads(pool: Tensor, pages: Tensor) -> Tensor:
    """Copy whole pages [H, W] of keys or values to [H, W * page_tokens, D]."""
    heads, dim = pages.shape[0], pool.shape[2]
    if pool.stride(1) != 1:
        return pool.index_select(0, pages.reshape(-1)).view(heads, -1, dim)
    # Pages packed by dimension stay so: transposing them costs twice the copy.
    rows, stride = _rows(pool.transpose(1, 2))
    packed = pages[:, None] * stride + torch.arange(dim, device=pool.device)[:, None]
    return rows.index_select(0, packed.reshape(-1)).view(heads, dim, -1).transpose(1, 2)


def write_slots(cache: PagedCache, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write entries [e, D] to slots [e] (page id * page_tokens + offset)."""
    for pool, entries in zip(cache, (keys, values), strict=True):
        page, offset = slots // pool.shape[1], slots % pool.shape[1]
        if _has_rows(pool):
            rows, stride = _rows(pool)
            rows.index_copy_(0, page * stride + offset, entries)
        else:
            pool[page, offset] = entries


def read_slots(cache: PagedCache, slots: Tensor) -> tuple[Tensor, Tensor]:
    """Copy the entries at slots [e] to keys and values [e, D]."""
    page_tokens = cache.keys.shape[1]
    page, offset = slots // page_tokens, slots % page_tokens
    return _read(cache.keys, page, offset), _read(cache.values, page, offset)


def _read(pool: Tensor, page: Tensor, offset: Tensor) -> Tensor:
    if not _has_rows(pool):
        return pool[page, offset]
    # Takes a quarter of the time of indexing by page and offset.
    rows, stride = _rows(pool)
    return rows.index_select(0, page * stride + offset)


def read_pages(cache: PagedCache, pages: Tensor, keys: Tensor, values: Tensor) -> None:
    """Copy whole pages [p], packed as they are, to keys and values [p, page_tokens * D]."""
    for pool, content in zip(cache, (keys, values), strict=True):
        if _is_whole(pool) and pool.device == content.device:
            torch.index_select(_whole_pages(pool), 0, pages, out=content)
        else:
            at_once = _pages_at_once(pool)
            for some, part in zip(pages.split(at_once), content.split(at_once), strict=True):
                part.view(len(some), *pool.shape[1:]).copy_(pool.index_select(0, some))


def write_pages(cache: PagedCache, pages: Tensor, keys: Tensor, values: Tensor) -> None:
    """Write whole pages [p, page_tokens * D] of a cache of the same `packing`."""
    for pool, content in zip(cache, (keys, values), strict=True):
        if _is_whole(pool) and pool.device == content.device:
            _whole_pages(pool).index_copy_(0, pages, content)
        else:
            at_once = _pages_at_once(pool)
            for some, part in zip(pages.split(at_once), content.split(at_once), strict=True):
                pool[some] = part.view(len(some), *pool.shape[1:]).to(pool.device)


def clear_pages(cache: PagedCache, pages: Tensor) -> None:
    """Fill pages [p] with zeros."""
    for pool in cache:
        (_whole_pages(pool) if _is_whole(pool) else pool).index_fill_(0, pages, 0)


def move_pages(cache: PagedCache, sources: Tensor, targets: Tensor) -> None:
    """Copy whole pages [p] over others [p]; no page is among both."""
    # Some at a time: the copy in between is memory outside the budget.
    parts = zip(sources.split(_MOVED_PAGES), targets.split(_MOVED_PAGES), strict=True)
    for some, places in parts:
        for pool in cache:
            whole = _whole_pages(pool) if _is_whole(pool) else pool
            whole[places] = whole.index_select(0, some)


def _pages_at_once(pool: Tensor) -> int:
    return max(1, _COPIED_BYTES // (2 * pool[0].numel() * pool.element_size()))


def _is_whole(pool: Tensor) -> bool:
    """Return whether each of a pool's pages is contiguous."""
    _, page_tokens, dim = pool.shape
    return pool.stride()[1:] in ((dim, 1), (1, page_tokens))


def _whole_pages(pool: Tensor) -> Tensor:
    """View a pool's pages as rows [pages, page_tokens * D]."""
    pages, page_tokens, dim = pool.shape
    return pool.as_strided((pages, page_tokens * dim), (pool.stride(0), 1))


def _has_rows(pool: Tensor) -> bool:
    """Return whether entries are contiguous, and pages a whole number of entries apart."""
    return pool.stride(2) == 1 and pool.stride(0) % pool.stride(1) == 0


def _rows(pool: Tensor) -> tuple[Tensor, int]:
    """View a pool as rows [r, D]; return them and the number of rows from page to page."""
    pages, page_tokens, dim = pool.shape
    stride = pool.stride(0) // pool.stride(1)
    shape = ((pages - 1) * stride + page_tokens, dim)
    return pool.as_strided(shape, (pool.stride(1), 1)), stride


@Operation
def compact(kept: Tensor, cache: PagedCache, source: Tensor, tables: Tensor, lens: Tensor) -> None:
    """Copy the kept entries of K layers, in order of position.

    Args:
        kept: [K, H, n] bool.
        source: [K, nb, H] int64, the pages to read.
        tables, lens: [K, H, W] int32, the pages to write, and [K, H], entries kept.
    """
    page_tokens = cache.keys.shape[1]
    for k, head in torch.cartesian_prod(*map(torch.arange, kept.shape[:2])).tolist():
        for entry, position in enumerate(kept[k, head].nonzero()[:, 0].tolist()):
            old = source[k, position // page_tokens, head], position % page_tokens
            new = tables[k, head, entry // page_tokens].long(), entry % page_tokens
            cache.keys[new] = cache.keys[old]
            cache.values[new] = cache.values[old]


@compact.on("cpu")
def _compact_in_parts(
    kept: Tensor, cache: PagedCache, source: Tensor, tables: Tensor, lens: Tensor
) -> None:
    page_tokens, dim = cache.keys.shape[1:]
    at_once = max(1, _COPIED_BYTES // (2 * dim * cache.keys.element_size()))
    if int(lens.sum()) <= at_once:
        _compact_at_once(kept, cache, source, tables, lens)
        return
    for k, head in torch.cartesian_prod(*map(torch.arange, kept.shape[:2])).tolist():
        positions, first = kept[k, head].nonzero()[:, 0], 0
        # Front to back, so that in place no entry is overwritten before it is read.
        for some in positions.split(at_once):
            slots = source[k, some // page_tokens, head] * page_tokens + some % page_tokens
            places = torch.arange(first, first + len(some))
            targets = tables[k, head, places // page_tokens].long() * page_tokens
            write_slots(cache, targets + places % page_tokens, *read_slots(cache, slots))
            first += len(some)


def _compact_at_once(
    kept: Tensor, cache: PagedCache, source: Tensor, tables: Tensor, lens: Tensor
) -> None:
    slots, targets = kept_slots(kept, cache, source, tables, lens)
    write_slots(cache, targets, *read_slots(cache, slots))


def kept_slots(
    kept: Tensor,
    cache: PagedCache,
    source: Tensor,
    tables: Tensor,
    lens: Tensor,
    target_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the slots [e] int64 of the kept entries, and those to which `compact` copies them.

    Args:
        kept, source, tables, lens: see `compact`.
        target_tokens: entries of a page to write; None for as many as a page of `cache` has.
    """
    page_tokens = cache.keys.shape[1]
    k, head, position = kept.nonzero(as_tuple=True)
    slots = source[k, position // page_tokens, head] * page_tokens + position % page_tokens
    flat = tables.flatten(0, 1), lens.flatten()
    return slots, placed_slots(*flat, target_tokens or page_tokens, len(slots))


class Conversion(NamedTuple):
    """How entries of blocks are stored in pages of fewer bits.

    page_tokens: entries of a page.
    write: stores keys and values [e, D] at slots [e] int64 of the pages.
    """

    page_tokens: int
    write: Callable[[Tensor, Tensor, Tensor], None]


def compact_into(
    kept: Tensor,
    cache: PagedCache,
    source: Tensor,
    conversion: Conversion,
    tables: Tensor,
    lens: Tensor,
) -> None:
    """Copy the kept entries of K layers into pages that store fewer bits, in order of position.

    Args:
        kept: [K, H, n] bool.
        source: [K, nb, H] int64, the pages of `cache` to read.
        tables, lens: [K, H, W] int32, the pages to write, and [K, H], entries kept.
    """
    slots, targets = kept_slots(kept, cache, source, tables, lens, conversion.page_tokens)
    at_once = max(1, _COPIED_BYTES // (2 * cache.keys.shape[2] * cache.keys.element_size()))
    for some, places in zip(slots.split(at_once), targets.split(at_once), strict=True):
        conversion.write(places, *read_slots(cache, some))


def write_in_bytes(
    cache: PagedCache, stored: torch.dtype, slots: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Write entries [e, D] to slots [e] of a cache of bytes, as numbers of eight bits."""
    write_slots(cache, slots, in_bytes(keys, stored), in_bytes(values, stored))


def in_bytes(numbers: Tensor, stored: torch.dtype) -> Tensor:
    """Return numbers as the bytes of an eight-bit dtype, the nearest that it has."""
    # Beyond its largest number a conversion yields no number.
    most = torch.finfo(stored).max
    return numbers.clamp(-most, most).to(stored).view(torch.uint8)


@Operation
def compact_in_place(kept: Tensor, cache: PagedCache, tables: Tensor, lens: Tensor) -> None:
    """Move the kept entries of K layers to the front of their heads' own pages.

    Args:
        kept: [K, H, n] bool.
        tables, lens: [K, H, W] int32, the pages, and [K, H], entries kept.
    """
    compact.reference(kept, cache, _own_pages(kept, cache, tables), tables, lens)


@compact_in_place.on("cpu")
def _compact_in_place(kept: Tensor, cache: PagedCache, tables: Tensor, lens: Tensor) -> None:
    compact(kept, cache, _own_pages(kept, cache, tables), tables, lens)


def _own_pages(kept: Tensor, cache: PagedCache, tables: Tensor) -> Tensor:
    """Return the pages [K, nb, H] int64 of entries [K, H, n] that lie in `tables`."""
    used = -(-kept.shape[-1] // cache.keys.shape[1])
    return tables[..., :used].transpose(1, 2).long()


def placed_slots(
    tables: Tensor, lens: Tensor, page_tokens: int, entries: int | None = None
) -> Tensor:
    """Return slots [e] int64 of all entries of heads with tables [H, W], head by head.

    Args:
        lens: [H], the entries of each head.
        entries: their sum; None makes a GPU's caller wait for it.
    """
    lens = lens.long()
    head = torch.repeat_interleave(
        torch.arange(lens.numel(), device=lens.device), lens, output_size=entries
    )
    position = torch.arange(len(head), device=lens.device) - (lens.cumsum(0) - lens)[head]
    return tables[head, position // page_tokens].long() * page_tokens + position % page_tokens
