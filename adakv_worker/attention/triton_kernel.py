"""Folded sequences in vLLM's Triton kernels, which also read and store numbers of fewer bits."""

from typing import NamedTuple

import torch
from torch import Tensor
from vllm.utils.math_utils import next_power_of_2
from vllm.v1.attention.backends import triton_attn
from vllm.v1.kv_cache_interface import KVQuantMode, get_kv_quant_mode

from adakv_serve.kernels.paging.entries import own_scales
from adakv_worker.attention.folded import Folded, Pages
from adakv_worker.stored_dtypes import has_scales, stored_dtype


class Segments(NamedTuple):
    """Buffers for parts of long sequences in small batches: see vLLM's `unified_attention`."""

    sequences: int
    segments: int
    outputs: Tensor
    most: Tensor
    sums: Tensor

    @classmethod
    def make(cls, group: int, head_size: int, device: torch.device) -> "Segments":
        """Allocate the buffers.

        Args:
            group: query heads of a KV head.
        """
        # One KV head for each sequence: this many fill the device without splits.
        sequences = triton_attn.MIN_LAUNCH_GRID_SIZE_2D
        count = triton_attn.NUM_PAR_SOFTMAX_SEGMENTS
        shape = (sequences, group, count)
        outputs, most, sums = (
            torch.empty(size, dtype=torch.float32, device=device)
            for size in ((*shape, next_power_of_2(head_size)), shape, shape)
        )
        return cls(sequences, count, outputs, most, sums)


class Factors(NamedTuple):
    """The factors of one attention layer.

    softmax_scale: of products of queries and keys. softcap: limit of the logits; 0 for none.
    key_scale, value_scale: one float32 number each; stored numbers are multiplied with it, unless
        entries have scales of their own.
    """

    softmax_scale: float
    softcap: float
    key_scale: Tensor
    value_scale: Tensor


def stored_pages(keys: Tensor, values: Tensor, kv_cache_dtype: str) -> Pages:
    """View pools of keys and values as `Pages` of the numbers that they store.

    Args:
        keys, values: [pages, page_tokens, 1, D], or bytes in place of D: see `Pages`.
    """
    stored = stored_dtype(kv_cache_dtype)
    if stored is None:
        return Pages(keys, values, kv_cache_dtype)
    pages = Pages(keys.view(stored), values.view(stored), kv_cache_dtype)
    if not has_scales(kv_cache_dtype):
        return pages
    return pages._replace(key_scales=own_scales(keys), value_scales=own_scales(values))


def store(
    pages: Pages, key: Tensor, value: Tensor, slots: Tensor, key_scale: Tensor, value_scale: Tensor
) -> None:
    """Write keys and values [e, 1, D] to slots [e] int64 of pages, in the format of the pages.

    Args:
        key_scale, value_scale: see `Factors`.
    """
    if pages.key_scales is None or pages.value_scales is None:
        triton_attn.triton_reshape_and_cache_flash(
            key, value, pages.keys, pages.values, slots, pages.kv_cache_dtype,
            key_scale, value_scale,
        )  # fmt: skip
        return
    triton_attn.triton_reshape_and_cache_flash_per_token_head_quant(
        key, value, pages.keys, pages.values, pages.key_scales, pages.value_scales, slots,
        get_kv_quant_mode(pages.kv_cache_dtype),
    )  # fmt: skip


def attend(query: Tensor, output: Tensor, folded: Folded, layer: int, factors: Factors) -> None:
    """Attend for folded sequences whose plan is `Segments`.

    Args:
        query, output: [tokens * H, group, D].
        layer: its index in the cache.
    """
    segments, pages = folded.plan, folded.pages
    assert isinstance(segments, Segments)
    mode = get_kv_quant_mode(pages.kv_cache_dtype)
    by_layer = mode == KVQuantMode.FP8_PER_TENSOR
    triton_attn.unified_attention(
        q=query,
        k=pages.keys,
        v=pages.values,
        out=output,
        cu_seqlens_q=folded.query_start_loc,
        max_seqlen_q=folded.most_tokens,
        seqused_k=folded.grown.lens[layer],
        max_seqlen_k=folded.most_entries,
        softmax_scale=factors.softmax_scale,
        causal=True,
        window_size=(-1, -1),
        block_table=folded.grown.tables[layer],
        softcap=factors.softcap,
        q_descale=None,
        k_descale=factors.key_scale if by_layer else None,
        v_descale=factors.value_scale if by_layer else None,
        seq_threshold_3D=segments.sequences,
        num_par_softmax_segments=segments.segments,
        softmax_segm_output=segments.outputs,
        softmax_segm_max=segments.most,
        softmax_segm_expsum=segments.sums,
        kv_quant_mode=mode,
        k_scale_cache=pages.key_scales,
        v_scale_cache=pages.value_scales,
    )
