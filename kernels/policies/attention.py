"""Softmax attention of an observation window over all keys, causal inside the window."""

import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from adakv_serve.kernels.dispatch import Operation
from adakv_serve.kernels.paging.entries import (
    PART_BYTES,
    Entries,
    PagedEntries,
    one_head,
    parts,
    read,
)
from adakv_serve.kernels.policies.observation import Observation

# Over the queries of a group: the mean, the largest mean of a query head, the sum of squares.
Reduction = Literal["mean", "max", "squares"]

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def window_attention(queries: Tensor, keys: Entries, scale: float) -> Tensor:
    """Return attention probabilities [H, G, w, n] of the last w queries, float32.

    Query i of the window attends to positions up to n - w + i, as in the prefill. This is the
    reference for `attention_rows`, which yields the same numbers in parts.

    Args:
        queries: [H, G, w, D], the queries of the last w positions.
        keys: [H, n, D].
        scale: softmax scale.
    """
    heads, group, window, dim = queries.shape
    n = keys.shape[1]
    flat = (queries.float() * scale).reshape(heads, group * window, dim)
    logits = torch.bmm(flat, read(keys).float().transpose(1, 2)).view(heads, group, window, n)
    future = torch.ones((window, window), dtype=torch.bool, device=logits.device).triu(1)
    logits[..., n - window :].masked_fill_(future, float("-inf"))
    return logits.softmax(dim=-1)


class AttentionRows(NamedTuple):
    """Attention [r, n] float32 of queries [first, first + r) of the [G * w] of one head.

    The next rows reuse the memory.
    """

    head: int
    first: int
    attention: Tensor


def attention_rows(queries: Tensor, keys: Entries, scale: float) -> Iterator[AttentionRows]:
    """Yield the rows of `window_attention`, as many of one head at a time as fit `PART_BYTES`."""
    heads, group, window, dim = queries.shape
    n, rows = keys.shape[1], group * window
    at_once = max(1, min(rows, PART_BYTES // (4 * n)))
    if at_once > window:
        at_once -= at_once % window
    for head in range(heads):
        scaled = (queries[head].float() * scale).reshape(rows, dim)
        for first in range(0, rows, at_once):
            logits = _logits(scaled[first : first + at_once], one_head(keys, head))
            newest = torch.arange(first, first + len(logits), device=logits.device) % window
            # Columns after the prompt, up to the end of its last page, are masked for every query.
            ahead = torch.arange(logits.shape[1] - (n - window), device=logits.device)
            logits[:, n - window :].masked_fill_(ahead > newest[:, None], float("-inf"))
            torch.softmax(logits, dim=-1, out=logits)
            yield AttentionRows(head, first, logits[:, :n])


def _logits(queries: Tensor, keys: Entries) -> Tensor:
    """Return products [r, n or more] of queries [r, D] and keys [1, n, D] to the end of a page."""
    n, logits, stop = keys.shape[1], queries.new_empty(0), 0
    for first, part in parts(keys, whole_pages=True):
        product = row_products(queries, part[0].float())
        stop = first + product.shape[1]
        if first == 0 and stop >= n:
            return product
        if first == 0:
            # The last page ends less than a part behind the last key.
            logits = queries.new_empty((len(queries), n + stop))
        logits[:, first:stop] = product
    return logits[:, :stop]


@Operation
def reduced_window_attention(
    queries: Tensor, keys: Entries, scale: float, reduction: Reduction = "mean"
) -> Tensor:
    """Return the window's attention [H, n - w] float32 to each entry before the window.

    Args:
        queries: [H, G, w, D], the queries of the last w positions.
        keys: [H, n, D]; heads may have different lengths. What is behind a head's end gets 0.
        scale: softmax scale.
        reduction: how the G * w probabilities of an entry become one number.
    """
    if isinstance(keys, PagedEntries) and keys.lens is not None:
        return _reduced_by_head(queries, keys, scale, reduction)
    window = queries.shape[2]
    attention = window_attention(queries, keys, scale)[..., :-window]
    if reduction == "squares":
        return attention.square().sum(dim=(1, 2))
    if reduction == "max":
        return attention.mean(dim=2).amax(dim=1)
    return attention.mean(dim=(1, 2))


@reduced_window_attention.on("cpu")
def _reduced_by_rows(
    queries: Tensor, keys: Entries, scale: float, reduction: Reduction = "mean"
) -> Tensor:
    if isinstance(keys, PagedEntries) and keys.lens is not None:
        return _reduced_by_head(queries, keys, scale, reduction)
    heads, group, window, _ = queries.shape
    if reduction == "max":
        by_member = (
            _reduced_by_rows(queries[:, member : member + 1], keys, scale)
            for member in range(group)
        )
        most = next(by_member)
        for other in by_member:
            torch.maximum(most, other, out=most)
        return most
    older = keys.shape[1] - window
    sums = queries.new_zeros((heads, older), dtype=torch.float32)
    ones = queries.new_ones((1, group * window), dtype=torch.float32)
    for head, _, attention in attention_rows(queries, keys, scale):
        before = attention[:, :older]
        if reduction == "squares":
            before.square_()
        # A product with ones adds the rows at a fraction of what `torch.sum` over them costs.
        sums[head] += (ones[:, : len(before)] @ before)[0]
    return sums if reduction == "squares" else sums.div_(group * window)


def _reduced_by_head(
    queries: Tensor, keys: PagedEntries, scale: float, reduction: Reduction
) -> Tensor:
    """Do what `reduced_window_attention` does for heads of different lengths, one by one."""
    assert keys.lens is not None
    heads, _, window, _ = queries.shape
    reduced = queries.new_zeros((heads, keys.num_entries - window), dtype=torch.float32)
    for head, entries in enumerate(keys.lens.tolist()):
        reduced[head, : entries - window] = reduced_window_attention(
            queries[head : head + 1], keys.head(head, entries), scale, reduction
        )[0]
    return reduced


def observed_attention(observation: Observation, window: int, reduction: Reduction) -> Tensor:
    """Return `reduced_window_attention` [H, n - window] of the last `window` queries."""
    return reduced_window_attention(
        observation.grouped_queries(window), observation.keys, observation.scale, reduction
    )


def row_products(rows: Tensor, others: Tensor) -> Tensor:
    """Return products [r, n] of rows [r, D] and others [n, D].

    They have the dtype of the rows, or float32 on a CPU that cannot multiply that dtype.
    """
    if rows.device.type == "cpu" and not _cpu_multiplies(rows.dtype):
        rows, others = rows.float(), others.float()
    if (
        _HAS_ONEDNN
        and rows.device.type == "cpu"
        and (others.is_contiguous() or others.t().is_contiguous())
    ):
        # `linear` calls this for 16 bits; for 32 it calls MKL, at half the speed on AMD's CPUs.
        products: Tensor = torch.ops.mkldnn._linear_pointwise(rows, others, None, "none", [], "")
        return products
    return rows @ others.t()


@functools.cache
def _cpu_multiplies(dtype: torch.dtype) -> bool:
    if dtype not in (torch.float16, torch.bfloat16):
        return True
    # oneDNN refuses dtypes that the CPU lacks; other libraries' products of 16 bits are several
    # times slower than products of 32 bits.
    name = "bf16" if dtype == torch.bfloat16 else "fp16"
    return _HAS_ONEDNN and bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported")())


def pool(scores: Tensor, kernel_size: int, mode: str) -> Tensor:
    """Return scores [H, m] pooled over positions; mode `max`, `avg` or `none`."""
    if mode == "none" or kernel_size == 1:
        return scores
    padding = kernel_size // 2
    if mode == "max":
        return torch.nn.functional.max_pool1d(scores, kernel_size, 1, padding)
    return torch.nn.functional.avg_pool1d(scores, kernel_size, 1, padding)
