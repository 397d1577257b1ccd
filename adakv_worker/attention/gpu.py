"""Attention on CUDA with compressed requests: FlashAttention, and vLLM's kernel in Triton.

Both read lengths and block tables from the device, so no step waits for the device. Beside either,
Triton's kernels attend to pages of fewer bits.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends import flash_attn, triton_attn
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheSpec
from vllm.v1.kv_cache_layout import KVCacheLayout

from adakv_serve.kernels.paging.growth import ExtendedStep, GrownStep
from adakv_worker.attention.folded import Folded, Pages, Step
from adakv_worker.attention.folding import (
    FoldingBackend,
    FoldingBuilder,
    FoldingImpl,
    WithStep,
    is_on,
)
from adakv_worker.attention.triton_kernel import Factors, Segments, attend, store
from adakv_worker.config import compression_config
from adakv_worker.refusals import REFUSED_ON_CUDA
from adakv_worker.stored_dtypes import has_scales, page_cache_dtype


class GPUFoldingBuilder(FoldingBuilder):
    """Mixin placed before a stock builder on CUDA, which supports full CUDA graphs of decodes.

    In a graph both the folded and the stock call attend for every row, one of them to a single
    entry whose result is dropped. Between attention layers any batch may run by a graph.
    """

    # vLLM's own attributes.
    num_heads_q: int
    kv_cache_spec: AttentionSpec

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        requests, self._heads = (
            vllm_config.scheduler_config.max_num_seqs,
            kv_cache_spec.num_kv_heads,
        )
        self._starts = torch.arange(requests * self._heads + 1, dtype=torch.int32, device=device)
        self._mask = torch.zeros(requests, dtype=torch.bool, device=device)
        self._seq_lens = torch.zeros(requests, dtype=torch.int32, device=device)

    @classmethod
    def get_cudagraph_support(
        cls, vllm_config: VllmConfig, kv_cache_spec: KVCacheSpec
    ) -> AttentionCGSupport:
        config = compression_config(vllm_config.additional_config)
        if config is not None and config.graph_table_bytes == 0:
            return AttentionCGSupport.NEVER
        return AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def fold(self, grown: GrownStep, requests: int) -> Folded:
        starts = self._starts[: grown.lens.shape[1] + 1]
        return Folded(requests, grown, self.pages, starts, 0, requests, plan=self._plan())

    def fold_extends(self, extended: ExtendedStep, tokens: Sequence[int], first: int) -> Folded:
        return super().fold_extends(extended, tokens, first)._replace(plan=self._plan())

    def _plan(self) -> Segments | None:
        """Return what Triton's kernel needs; None if another kernel attends."""
        return self._segments if is_quantized_kv_cache(self.pages.kv_cache_dtype) else None

    @functools.cached_property
    def _segments(self) -> Segments:
        group = self.num_heads_q // self._heads
        return Segments.make(group, self.kv_cache_spec.head_size, self.pages.keys.device)

    def fold_for_graph(self, grown: GrownStep, compressed: int) -> Folded:
        rows = grown.lens.shape[1] // self._heads
        mask = self._mask[:rows]
        mask[:compressed], mask[compressed:] = True, False
        self._compressed = compressed
        queries = None if self.graph_queries is None else self.graph_queries[:, :rows]
        return self.fold(grown, rows)._replace(mask=mask, queries=queries)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        step = self.next_step
        if step is not None and step.decodes is not None and step.decodes.mask is not None:
            common_attn_metadata = self._without_compressed(common_attn_metadata)
        return super().build(common_prefix_len, common_attn_metadata, fast_build)

    def _without_compressed(self, common: CommonAttentionMetadata) -> CommonAttentionMetadata:
        """Make the stock call attend to one entry of a compressed row, and store none."""
        seq_lens = self._seq_lens[: common.num_reqs]
        seq_lens.copy_(common.seq_lens)
        seq_lens[: self._compressed] = 1
        common.slot_mapping[: self._compressed] = -1
        return replace(common, seq_lens=seq_lens)

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Any:
        grown = self.tables.grow([], graph_rows=common_attn_metadata.num_reqs)
        self.next_step = Step(self.fold_for_graph(grown, 0), [])
        metadata = self.build(0, common_attn_metadata)
        # A capture drops its results, and is faster with little to attend to.
        metadata.seq_lens.fill_(1)
        return metadata


class GPUFoldingBackend(FoldingBackend):
    refused = REFUSED_ON_CUDA

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...] | None:
        # A block's pages lie together, so that each of them may serve any layer and head.
        return (KVCacheLayout.BLHNC,) if is_on() else super().supported_kv_cache_layouts()


class GPUFoldingImpl(FoldingImpl):
    """Mixin placed before a stock implementation on CUDA."""

    # vLLM's own attribute.
    logits_soft_cap: float

    def _store_in_triton(
        self, layer: Any, key: Tensor, value: Tensor, pages: Pages, slots: Tensor
    ) -> None:
        store(pages, key, value, slots, *_scales(layer, pages))

    def _attend_in_triton(
        self, layer: Any, index: int, query: Tensor, output: Tensor, folded: Folded
    ) -> None:
        scales = _scales(layer, folded.pages)
        attend(query, output, folded, index, Factors(self.scale, self.logits_soft_cap, *scales))


def _scales(layer: Any, pages: Pages) -> tuple[Tensor, Tensor]:
    """Return what stored keys and values are multiplied with."""
    if pages.scale is not None:
        # The layer's own are for its blocks.
        return pages.scale, pages.scale
    return layer._k_scale, layer._v_scale


@dataclass
class AdaKVFlashMetadata(WithStep, flash_attn.FlashAttentionMetadata):
    """Metadata of FlashAttention."""


class AdaKVFlashMetadataBuilder(GPUFoldingBuilder, flash_attn.FlashAttentionMetadataBuilder):
    metadata_class = AdaKVFlashMetadata


# In larger blocks FlashAttention 3 may read values after a prompt's end and multiply them
# with zero. If a page of int8 or int4 was there before, they may be NaN, and so is the product.
_MOST_BLOCK_TOKENS = 64
# With more sequences FlashAttention 3 splits none, and would waste the memory for their parts.
_MOST_SPLIT_SEQUENCES = 992


def folded_splits(sequences: int, version: int, most: int) -> int:
    """Return the limit on the parts of a folded sequence in FlashAttention; 0 for no limit.

    Without a limit FlashAttention 3 takes hundreds of megabytes. FlashAttention 2 has none.
    """
    if version == 2:
        return 0
    return most if sequences <= _MOST_SPLIT_SEQUENCES else 1


class AdaKVFlashImpl(GPUFoldingImpl, flash_attn.FlashAttentionImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.vllm_flash_attn_version not in (2, 3):
            raise ValueError(
                "adakv: compression works with FlashAttention 2 and 3, not "
                f"{self.vllm_flash_attn_version}: set attention_backend to TRITON_ATTN"
            )
        if is_quantized_kv_cache(self.kv_cache_dtype):
            raise ValueError(
                f"adakv: compression does not work with kv_cache_dtype {self.kv_cache_dtype} in "
                "FlashAttention: set attention_backend to TRITON_ATTN"
            )
        config = get_current_vllm_config()
        if (
            has_scales(page_cache_dtype(config))
            and config.cache_config.block_size > _MOST_BLOCK_TOKENS
        ):
            raise ValueError(
                "adakv: page_dtype int8 and int4 do not work with FlashAttention and a block_size "
                f"over {_MOST_BLOCK_TOKENS}: set attention_backend to TRITON_ATTN"
            )
        attention = config.attention_config
        self._most_splits = attention.flash_attn_max_num_splits_for_cuda_graph
        if self.batch_invariant_enabled:
            self._most_splits = 1

    def _store_folded(
        self, layer: Any, key: Tensor, value: Tensor, pages: Pages, slots: Tensor
    ) -> None:
        if is_quantized_kv_cache(pages.kv_cache_dtype):
            self._store_in_triton(layer, key, value, pages, slots)
            return
        flash_attn.reshape_and_cache_flash(
            key, value, pages.keys, pages.values, slots, self.kv_cache_dtype,
            layer._k_scale, layer._v_scale,
        )  # fmt: skip

    def _splits(self, folded: Folded) -> int:
        assert self.vllm_flash_attn_version is not None
        if folded.most_tokens > 1:
            # Enough queries to fill the device without splits.
            return 1 if self.vllm_flash_attn_version == 3 else 0
        return folded_splits(
            folded.grown.lens.shape[1], self.vllm_flash_attn_version, self._most_splits
        )

    def _attend_folded(
        self, layer: Any, index: int, query: Tensor, output: Tensor, folded: Folded
    ) -> None:
        assert self.vllm_flash_attn_version is not None
        if is_quantized_kv_cache(folded.pages.kv_cache_dtype):
            self._attend_in_triton(layer, index, query, output, folded)
            return
        flash_attn.flash_attn_varlen_func(
            q=query,
            k=folded.pages.keys,
            v=folded.pages.values,
            out=output,
            cu_seqlens_q=folded.query_start_loc,
            max_seqlen_q=folded.most_tokens,
            seqused_k=folded.grown.lens[index],
            max_seqlen_k=folded.most_entries,
            softmax_scale=self.scale,
            causal=True,
            block_table=folded.grown.tables[index],
            softcap=self.logits_soft_cap,
            fa_version=self.vllm_flash_attn_version,
            num_splits=self._splits(folded),
        )


class AdaKVFlashBackend(GPUFoldingBackend, flash_attn.FlashAttentionBackend):  # type: ignore[misc]
    """The backend registered in place of vLLM's FLASH_ATTN."""

    folding_impl = AdaKVFlashImpl
    folding_builder = AdaKVFlashMetadataBuilder


@dataclass
class AdaKVTritonMetadata(WithStep, triton_attn.TritonAttentionMetadata):
    """Metadata of Triton's unified attention."""


class AdaKVTritonMetadataBuilder(GPUFoldingBuilder, triton_attn.TritonAttentionMetadataBuilder):
    metadata_class = AdaKVTritonMetadata

    def _plan(self) -> Segments:
        return self._segments

    def _nothing(self, common: Any) -> dict[str, Any]:
        return {
            **super()._nothing(common),
            "seq_threshold_3D": 0,
            "num_par_softmax_segments": self.num_par_softmax_segments,
            "softmax_segm_output": self.softmax_segm_output,
            "softmax_segm_max": self.softmax_segm_max,
            "softmax_segm_expsum": self.softmax_segm_expsum,
            "causal": True,
        }


class AdaKVTritonImpl(GPUFoldingImpl, triton_attn.TritonAttentionImpl):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Scorers look at the queries as the model computes them.
        self.supports_quant_query_input = False

    _store_folded = GPUFoldingImpl._store_in_triton
    _attend_folded = GPUFoldingImpl._attend_in_triton


class AdaKVTritonBackend(GPUFoldingBackend, triton_attn.TritonAttentionBackend):  # type: ignore[misc]
    """The backend registered in place of vLLM's TRITON_ATTN."""

    folding_impl = AdaKVTritonImpl
    folding_builder = AdaKVTritonMetadataBuilder
