"""Window attention over keys in pages: first log-sum-exp of each query, then a sum for each key.

Probabilities are never stored: the second pass computes them again from the row's log-sum-exp and
adds them up by key, so that memory traffic is twice the keys.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from adakv_serve.kernels.paging.entries import Entries, PagedEntries, Quantization, own_scales
from adakv_serve.kernels.policies.attention import Reduction, reduced_window_attention

# Keys and rows of a tile; fewer of wide float32 ones, since tiles lie in shared memory.
_TILE, _TILE_OF_WIDE, _WIDE_BYTES = 64, 32, 1024
# Enough programs to fill a large GPU, each with enough keys to pay for its start.
_PROGRAMS = 1024
# How keys are stored: in full; in eight bits, with a scale for each head or after each entry; in
# four bits, with a scale after each entry.
_PLAIN, _BY_HEAD, _BY_ENTRY, _FOUR_BITS = map(tl.constexpr, range(4))


def window_scores(
    queries: Tensor,
    pool: Tensor,
    pages: Tensor,
    scale: float,
    num_tokens: int,
    reduction: Reduction = "mean",
) -> Tensor:
    """Return scores [H, n - w] float32 of the entries before the window, from keys in pages.

    Args:
        queries: [H, G, w, D] of the last w positions.
        pool: [pages, page_tokens, D] keys.
        pages: [nb, H] int64, the pages of the prompt's blocks.
        scale: the softmax scale.
        num_tokens: n.
        reduction: `mean` over window and group; `max` over the group of means over the window;
            sum of `squares` over both.
    """
    return _scores(queries, pool, pages, scale, num_tokens, reduction)


@reduced_window_attention.on("cuda")
def _reduced(queries: Tensor, keys: Entries, scale: float, reduction: Reduction = "mean") -> Tensor:
    n = keys.shape[1]
    if isinstance(keys, PagedEntries):
        pages, quantization = keys.pages.t().contiguous(), keys.quantization
        if quantization is not None and quantization.rotation is not None:
            # (q R^T) k = q (k R): the queries are rotated, because they are fewer than the keys.
            turned = queries.float() @ quantization.rotation.t()
            queries = turned.to(queries.dtype)
        return _scores(queries, keys.pool, pages, scale, n, reduction, keys.lens, quantization)
    return _scores(queries, keys, None, scale, n, reduction)


def _stored(keys: Tensor, quantization: Quantization | None) -> tuple[Tensor, dict[str, object]]:
    """Return the pool as the numbers that it stores, and what the kernels need to read them."""
    page_stride = token_stride = 0
    if quantization is None:
        stored, scales, form = keys, keys, _PLAIN
    elif quantization.scales is not None:
        stored, scales = keys.view(quantization.stored), quantization.scales.contiguous()
        form = _BY_HEAD
    else:
        stored, scales = keys.view(quantization.stored), own_scales(keys)
        page_stride, token_stride = scales.stride()
        form = _FOUR_BITS if quantization.has_four_bits else _BY_ENTRY
    return stored, {
        "scales": scales, "scale_page": page_stride, "scale_token": token_stride,
        "FORMAT": form.value,
    }  # fmt: skip


def _scores(
    queries: Tensor,
    keys: Tensor,
    pages: Tensor | None,
    scale: float,
    n: int,
    reduction: Reduction,
    lens: Tensor | None = None,
    quantization: Quantization | None = None,
) -> Tensor:
    """Return scores [H, n - w]; heads with `lens` [H] int32 have 0 behind their ends."""
    heads, group, window, dim = queries.shape
    rows = group * window
    queries = queries.reshape(heads, rows, dim)
    tile = _TILE if dim * queries.element_size() < _WIDE_BYTES else _TILE_OF_WIDE
    row_tiles, key_tiles = triton.cdiv(rows, tile), triton.cdiv(n, tile)
    splits = max(1, min(key_tiles, _PROGRAMS // (heads * row_tiles)))
    most, total = queries.new_empty((2, heads, rows, splits), dtype=torch.float32)
    # Powers of two instead of e: one instruction on the GPU.
    scale = scale * math.log2(math.e)
    keys, stored = _stored(keys, quantization)
    layout = {
        **stored,
        "pages": queries if pages is None else pages,
        "lens": queries if lens is None else lens.contiguous(),
        "RAGGED": lens is not None,
        "stride_head": keys.stride(0),
        "stride_token": keys.stride(1),
        "stride_dim": keys.stride(2),
        "PAGE": 0 if pages is None else keys.shape[1],
        "DIM": dim,
        "BLOCK_DIM": triton.next_power_of_2(max(dim, 16)),
        "BLOCK_ROWS": tile,
        "BLOCK_KEYS": tile,
        # Triton's interpreter multiplies bfloat16 by its bits, as integers.
        "EXACT": queries.dtype == torch.float32 or triton.knobs.runtime.interpret,
    }
    _log_sum_exp[(heads, row_tiles, splits)](
        queries, keys, most, total, scale, n, rows, window, splits,
        triton.cdiv(key_tiles, splits), heads, **layout,
    )  # fmt: skip
    normalizer = queries.new_empty((heads, rows), dtype=torch.float32)
    _combine[(heads * rows,)](
        most, total, normalizer, splits, BLOCK_SPLITS=triton.next_power_of_2(splits), num_warps=1
    )
    scores = queries.new_empty((heads, n - window), dtype=torch.float32)
    segments, segment_rows = (group, window) if reduction == "max" else (1, rows)
    if n > window:
        _column_scores[(heads, triton.cdiv(n - window, tile))](
            queries, keys, normalizer, scores, scale, n - window, window, rows, segments,
            segment_rows, heads, SQUARES=reduction == "squares", **layout,
        )  # fmt: skip
    return scores


@triton.jit
def _load_keys(
    keys, pages, head, heads, position, valid, stride_head, stride_token, stride_dim,
    scales, scale_page, scale_token,
    PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Keys [BLOCK_DIM, BLOCK_KEYS] at `position`."""
    dim = tl.arange(0, BLOCK_DIM)
    place = dim // 2 if FORMAT == _FOUR_BITS else dim
    if PAGE > 0:
        page = tl.load(pages + (position // PAGE) * heads + head, mask=valid, other=0)
        page, offset = page.to(tl.int64), position % PAGE
    else:
        page, offset = head.to(tl.int64) + tl.zeros_like(position), position.to(tl.int64)
    start = page * stride_head + offset * stride_token
    key = tl.load(
        keys + start[None, :] + place[:, None] * stride_dim,
        mask=valid[None, :] & (dim < DIM)[:, None],
        other=0.0,
    )
    if FORMAT == _BY_HEAD:
        key = key.to(tl.float32) * tl.load(scales + head)
    elif FORMAT != _PLAIN:
        scale = tl.load(scales + page * scale_page + offset * scale_token, mask=valid, other=0.0)
        if FORMAT == _BY_ENTRY:
            key = key.to(tl.float32) * scale[None, :]
        else:
            bits = scale.to(tl.int32, bitcast=True)
            zero = (bits & 0xF).to(tl.float32)
            scale = (bits & -16).to(tl.float32, bitcast=True)
            number = (key >> ((dim % 2) * 4)[:, None].to(tl.uint8)) & 0xF
            key = (number.to(tl.float32) - zero[None, :]) * scale[None, :]
    return key


@triton.jit
def _load_queries(
    queries, head, rows, row, valid, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr
):  # fmt: skip
    """Queries [BLOCK_ROWS, BLOCK_DIM]."""
    dim = tl.arange(0, BLOCK_DIM)
    start = (head.to(tl.int64) * rows + row) * DIM
    return tl.load(
        queries + start[:, None] + dim[None, :],
        mask=valid[:, None] & (dim < DIM)[None, :],
        other=0.0,
    )


@triton.jit
def _product(query, key, EXACT: tl.constexpr):
    if EXACT:
        return tl.dot(query.to(tl.float32), key.to(tl.float32), input_precision="ieee")
    return tl.dot(query, key.to(query.dtype))


# Lengths differ from request to request; a number that is divisible by 16 would be compiled anew.
@triton.jit(do_not_specialize=["n", "splits", "tiles_per_split"])
def _log_sum_exp(
    queries, keys, most, total, scale, n, rows, window, splits, tiles_per_split, heads,
    pages, lens, stride_head, stride_token, stride_dim, scales, scale_page, scale_token,
    RAGGED: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr, EXACT: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Compute maximum and sum of powers over one split of the keys, for a tile of rows."""
    head, split = tl.program_id(0), tl.program_id(2)
    if RAGGED:
        n = tl.load(lens + head)
    row = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    is_row = row < rows
    query = _load_queries(queries, head, rows, row, is_row, DIM, BLOCK_DIM)
    last_seen = n - window + row % window
    highest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    summed = tl.zeros([BLOCK_ROWS], tl.float32)
    first = split * tiles_per_split
    for tile in range(first, min(first + tiles_per_split, tl.cdiv(n, BLOCK_KEYS))):
        position = tile * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
        key = _load_keys(
            keys, pages, head, heads, position, position < n,
            stride_head, stride_token, stride_dim, scales, scale_page, scale_token,
            PAGE, DIM, BLOCK_DIM, FORMAT,
        )  # fmt: skip
        logits = _product(query, key, EXACT) * scale
        logits = tl.where(position[None, :] <= last_seen[:, None], logits, float("-inf"))
        higher = tl.maximum(highest, tl.max(logits, 1))
        # Without this a row without keys so far would subtract infinities.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        summed = summed * tl.exp2(highest - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        highest = higher
    place = (head.to(tl.int64) * rows + row) * splits + split
    tl.store(most + place, highest, mask=is_row)
    tl.store(total + place, summed, mask=is_row)


@triton.jit(do_not_specialize=["splits"])
def _combine(most, total, normalizer, splits, BLOCK_SPLITS: tl.constexpr):
    """Compute the logarithm of a row's sum of powers from those of its splits."""
    row = tl.program_id(0)
    split = tl.arange(0, BLOCK_SPLITS)
    place = row.to(tl.int64) * splits + split
    highest = tl.load(most + place, mask=split < splits, other=float("-inf"))
    summed = tl.load(total + place, mask=split < splits, other=0.0)
    base = tl.max(highest, 0)
    tl.store(normalizer + row, base + tl.log2(tl.sum(summed * tl.exp2(highest - base), 0)))


@triton.jit(do_not_specialize=["columns"])
def _column_scores(
    queries, keys, normalizer, scores, scale, columns, window, rows, segments, segment_rows, heads,
    pages, lens, stride_head, stride_token, stride_dim, scales, scale_page, scale_token,
    RAGGED: tl.constexpr, SQUARES: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    EXACT: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Reduce the probabilities of a tile of keys: over segments of rows, then their maximum.

    All rows attend to all of these keys, which lie before the window.
    """
    head = tl.program_id(0)
    position = tl.program_id(1) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    entries = columns
    if RAGGED:
        entries = tl.load(lens + head) - window
    is_entry = position < entries
    key = _load_keys(
        keys, pages, head, heads, position, is_entry,
        stride_head, stride_token, stride_dim, scales, scale_page, scale_token,
        PAGE, DIM, BLOCK_DIM, FORMAT,
    )  # fmt: skip
    best = tl.zeros([BLOCK_KEYS], tl.float32)
    for segment in range(segments):
        summed = tl.zeros([BLOCK_KEYS], tl.float32)
        for start in range(0, segment_rows, BLOCK_ROWS):
            within = start + tl.arange(0, BLOCK_ROWS)
            is_row = within < segment_rows
            row = segment * segment_rows + within
            query = _load_queries(queries, head, rows, row, is_row, DIM, BLOCK_DIM)
            base = tl.load(normalizer + head * rows + row, mask=is_row, other=float("inf"))
            weight = tl.exp2(_product(query, key, EXACT) * scale - base[:, None])
            if SQUARES:
                weight = weight * weight
            summed += tl.sum(weight, 0)
        best = tl.maximum(best, summed)
    if not SQUARES:
        best = best / segment_rows
    best = tl.where(is_entry, best, 0.0)
    tl.store(scores + head.to(tl.int64) * columns + position, best, mask=position < columns)
