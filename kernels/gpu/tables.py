"""Page tables on the device: new pages and growth by a token without waiting for the host.

The scheduler grants slabs by a static bound, so a request runs out of pages only by a fault. A page
beyond the slabs is never written: its slot is -1, which cache writes leave out.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from adakv_serve.kernels.paging.layout import PageLayout

_COLUMNS = 64


def place_pages(
    lens: Tensor, slabs: Tensor, used: Tensor, layout: PageLayout, page_tokens: int, width: int
) -> Tensor:
    """Give the heads of K layers a request's next pages; return tables [K, H, width] int32.

    Does what `kernels.paging.host_tables.HostTables.place_layers` does. Columns past the entries
    are -1.

    Args:
        lens: [K, H] int32 entries.
        slabs: [S] int32, the request's blocks.
        used: [1] int32, its pages in use; raised in place.
        layout: with its offsets on the device of `lens`.
        width: an upper bound on the pages of the longest head.
    """
    rows = lens.numel()
    needed = (lens.view(-1).to(torch.int64) + page_tokens - 1) // page_tokens
    ends = needed.cumsum(dim=0)
    first = used + ends - needed
    tables = torch.empty((*lens.shape, width), dtype=torch.int32, device=lens.device)
    _place[(rows, triton.cdiv(width, _COLUMNS))](
        needed, first, slabs, layout.offsets, tables, width, slabs.numel(), layout.block_stride,
        EACH=layout.pages_per_block, TILE=_COLUMNS,
    )  # fmt: skip
    used += ends[-1].to(used.dtype)
    return tables


def grow_by_one(
    lens: Tensor,
    tables: Tensor,
    used: Tensor,
    slabs: Tensor,
    granted: Tensor,
    layout: PageLayout,
    page_tokens: int,
    slots: Tensor | None = None,
) -> Tensor:
    """Add one entry to every head of R requests, in place; return its slots [L, N * H] int64.

    Does what `kernels.paging.growth.grow_reference` does.

    Args:
        lens: [L, N, H] int32 entries of N >= R rows; those after the first R stay unchanged.
        tables: [L, N, H, W] int32 page ids.
        used: [R] int32 pages in use.
        slabs: [R, S] int32, their blocks, of which [R] int32 `granted` count.
        layout: with its offsets on the device of `lens`.
        slots: memory for the result; None takes fresh memory, and then N is R.
    """
    layers, requests, heads = lens.shape
    if slots is None:
        slots = torch.empty((layers, requests * heads), dtype=torch.int64, device=lens.device)
    if len(used) == 0:
        return slots
    _grow[(len(used),)](
        lens, tables, used, slabs, granted, layout.offsets, slots,
        requests, heads, tables.shape[3], slabs.shape[1], layout.block_stride,
        PAGE=page_tokens, EACH=layers * heads, BLOCK=triton.next_power_of_2(layers * heads),
    )  # fmt: skip
    return slots


# Triton recompiles when a number becomes 1 or divisible by 16, which these do while requests run.
@triton.jit(do_not_specialize=["width", "slab_count"])
def _place(
    needed, first, slabs, offsets, tables, width, slab_count, block_stride,
    EACH: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    ordinal = tl.load(first + row) + column
    owned = (column < tl.load(needed + row)) & (ordinal < slab_count * EACH)
    slab = tl.load(slabs + ordinal // EACH, mask=owned, other=0)
    page = slab * block_stride + tl.load(offsets + ordinal % EACH, mask=owned, other=0)
    place = tables + row.to(tl.int64) * width + column
    tl.store(place, tl.where(owned, page, -1).to(tl.int32), mask=column < width)


@triton.jit(do_not_specialize=["requests", "width", "slab_width"])
def _grow(
    lens, tables, used, slabs, granted, offsets, slots,
    requests, heads, width, slab_width, block_stride,
    PAGE: tl.constexpr, EACH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    request = tl.program_id(0)
    index = tl.arange(0, BLOCK)
    valid = index < EACH
    place = ((index // heads) * requests + request) * heads + index % heads
    entries = tl.load(lens + place, mask=valid, other=1)
    column = entries // PAGE
    full = valid & (entries % PAGE == 0)
    taken = tl.load(used + request)
    ordinal = taken + tl.cumsum(full.to(tl.int32), 0) - 1
    fits = full & (ordinal < tl.load(granted + request) * EACH)
    slab = tl.load(slabs + request * slab_width + ordinal // EACH, mask=fits, other=0)
    fresh = slab * block_stride + tl.load(offsets + ordinal % EACH, mask=fits, other=0)
    cell = tables + place.to(tl.int64) * width + column
    tl.store(cell, fresh.to(tl.int32), mask=fits & (column < width))
    current = tl.load(cell, mask=valid & (column < width) & (full == 0), other=0).to(tl.int64)
    page = tl.where(full, fresh.to(tl.int64), current)
    lost = (full & (fits == 0)) | (column >= width)
    slot = tl.where(lost, -1, page * PAGE + entries % PAGE)
    tl.store(slots + place, slot, mask=valid)
    tl.store(lens + place, entries + 1, mask=valid)
    tl.store(used + request, taken + tl.sum(full.to(tl.int32), 0))
