"""Copies of kept entries: their positions are listed, then rows move from page to page."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adakv_serve.kernels.paging.paged_cache import PagedCache, compact, compact_in_place

_TILE = 64
_COUNTED = 1024
_PROGRAMS = 2048


@compact.on("cuda")
def compact_paged(
    kept: Tensor, cache: PagedCache, source: Tensor, tables: Tensor, lens: Tensor
) -> None:
    """Do what `kernels.paging.paged_cache.compact` does; no target page may be a source.

    The positions of the kept entries are listed first, so that every thread that copies has an
    entry to copy.
    """
    layers, heads, n = kept.shape
    rows = layers * heads
    kept, source, tables = kept.contiguous(), source.contiguous(), tables.contiguous()
    room = min(n, tables.shape[2] * cache.keys.shape[1])
    tiles = triton.cdiv(n, _COUNTED)
    splits = max(1, min(tiles, _PROGRAMS // rows))
    span = triton.cdiv(tiles, splits) * _COUNTED
    counts = torch.empty((rows, splits), dtype=torch.int32, device=kept.device)
    if splits > 1:
        _count_kept[(rows, splits)](kept, counts, n, span, splits, TILE=_COUNTED)
    positions = torch.empty((rows, room), dtype=torch.int32, device=kept.device)
    _list_kept[(rows, splits)](
        kept, counts, positions, n, span, splits, room,
        TILE=_COUNTED, SPLITS=triton.next_power_of_2(splits),
    )  # fmt: skip
    _copy_listed[(rows, triton.cdiv(room, _TILE))](
        positions, lens.contiguous(), source, tables, *cache, room, heads, source.shape[1],
        tables.shape[2], *cache.keys.stride(), *cache.values.stride(), **_shape(cache), TILE=_TILE,
    )  # fmt: skip


@compact_in_place.on("cuda")
def compact_pages_in_place(kept: Tensor, cache: PagedCache, tables: Tensor, lens: Tensor) -> None:
    """Do what `paged_cache.compact_in_place` does: a program for each head, front to back."""
    layers, heads, n = kept.shape
    _move_kept[(layers * heads,)](
        kept.contiguous(), tables.contiguous(), *cache, n, tables.shape[2],
        *cache.keys.stride(), *cache.values.stride(), **_shape(cache), TILE=_TILE,
    )  # fmt: skip


def _shape(cache: PagedCache) -> dict[str, int]:
    _, page_tokens, dim = cache.keys.shape
    return {"PAGE": page_tokens, "DIM": dim, "BLOCK_DIM": triton.next_power_of_2(dim)}


@triton.jit(do_not_specialize=["splits"])
def _count_kept(kept, counts, n, span, splits, TILE: tl.constexpr):
    row, split = tl.program_id(0), tl.program_id(1)
    start = split * span
    count = tl.zeros([TILE], tl.int32)
    for tile in range(start, min(start + span, n), TILE):
        position = tile + tl.arange(0, TILE)
        here = tl.load(kept + row.to(tl.int64) * n + position, mask=position < n, other=0)
        count += (here != 0).to(tl.int32)
    tl.store(counts + row * splits + split, tl.sum(count, 0))


@triton.jit
def _offsets(
    pages, offset, stride_page, stride_token, stride_dim, BLOCK_DIM: tl.constexpr
):  # fmt: skip
    """Offsets [TILE, BLOCK_DIM] of the entries at `offset` in `pages`."""
    dim = tl.arange(0, BLOCK_DIM)
    start = pages.to(tl.int64) * stride_page + offset * stride_token
    return start[:, None] + dim[None, :] * stride_dim


@triton.jit(do_not_specialize=["splits", "room"])
def _list_kept(
    kept, counts, positions, n, span, splits, room, TILE: tl.constexpr, SPLITS: tl.constexpr
):  # fmt: skip
    """List the positions of a row's kept entries in order, one span of the row per program."""
    row, split = tl.program_id(0), tl.program_id(1)
    start = split * span
    entries = 0
    if SPLITS > 1:
        other = tl.arange(0, SPLITS)
        entries = tl.sum(tl.load(counts + row * splits + other, mask=other < split, other=0), 0)
    listed = positions + row.to(tl.int64) * room
    for tile in range(start, min(start + span, n), TILE):
        position = tile + tl.arange(0, TILE)
        here = tl.load(kept + row.to(tl.int64) * n + position, mask=position < n, other=0)
        stays = (here != 0).to(tl.int32)
        entry = entries + tl.cumsum(stays, 0) - 1
        tl.store(listed + entry, position, mask=(stays == 1) & (entry < room))
        entries += tl.sum(stays, 0)


@triton.jit(do_not_specialize=["room", "blocks", "width"])
def _copy_listed(
    positions, lens, source, tables, keys, values, room, heads, blocks, width,
    key_page, key_token, key_dim, value_page, value_token, value_dim,
    PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    first = tl.program_id(1) * TILE
    count = tl.load(lens + row)
    if first < count:
        layer, head = row // heads, row % heads
        entry = first + tl.arange(0, TILE)
        stays = entry < count
        position = tl.load(positions + row.to(tl.int64) * room + entry, mask=stays, other=0)
        block = (layer * blocks + position // PAGE).to(tl.int64) * heads + head
        old = tl.load(source + block, mask=stays, other=0)
        new = tl.load(tables + row.to(tl.int64) * width + entry // PAGE, mask=stays, other=0)
        mask = stays[:, None] & (tl.arange(0, BLOCK_DIM) < DIM)[None, :]
        offset, new_offset = position % PAGE, entry % PAGE
        place = _offsets(old, offset, key_page, key_token, key_dim, BLOCK_DIM)
        key = tl.load(keys + place, mask=mask, other=0.0)
        place = _offsets(old, offset, value_page, value_token, value_dim, BLOCK_DIM)
        value = tl.load(values + place, mask=mask, other=0.0)
        place = _offsets(new, new_offset, key_page, key_token, key_dim, BLOCK_DIM)
        tl.store(keys + place, key, mask=mask)
        place = _offsets(new, new_offset, value_page, value_token, value_dim, BLOCK_DIM)
        tl.store(values + place, value, mask=mask)


@triton.jit(do_not_specialize=["width"])
def _move_kept(
    kept, tables, keys, values, n, width,
    key_page, key_token, key_dim, value_page, value_token, value_dim,
    PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    table = tables + row.to(tl.int64) * width
    is_dim = tl.arange(0, BLOCK_DIM) < DIM
    entries = 0
    for tile in range(0, n, TILE):
        position = tile + tl.arange(0, TILE)
        here = tl.load(kept + row.to(tl.int64) * n + position, mask=position < n, other=0)
        stays = here != 0
        entry = entries + tl.cumsum(stays.to(tl.int32), 0) - 1
        moves = stays & (entry < position)
        old = tl.load(table + position // PAGE, mask=moves, other=0)
        new = tl.load(table + entry // PAGE, mask=moves, other=0)
        mask = moves[:, None] & is_dim[None, :]
        offset, new_offset = position % PAGE, entry % PAGE
        place = _offsets(old, offset, key_page, key_token, key_dim, BLOCK_DIM)
        key = tl.load(keys + place, mask=mask, other=0.0)
        place = _offsets(old, offset, value_page, value_token, value_dim, BLOCK_DIM)
        value = tl.load(values + place, mask=mask, other=0.0)
        # Targets lie before their own sources, but may be the sources of others in this tile.
        tl.debug_barrier()
        key_place = _offsets(new, new_offset, key_page, key_token, key_dim, BLOCK_DIM)
        value_place = _offsets(new, new_offset, value_page, value_token, value_dim, BLOCK_DIM)
        tl.store(keys + key_place, key, mask=mask)
        tl.store(values + value_place, value, mask=mask)
        tl.debug_barrier()
        entries += tl.sum(stays.to(tl.int32), 0)
