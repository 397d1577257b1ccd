"""CPU attention with compressed requests."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from adakv_serve.kernels.paging.growth import ExtendedStep, GrownStep
from adakv_serve.kernels.paging.paged_cache import PagedCache
from adakv_worker.attention.folded import Folded, Pages
from adakv_worker.attention.folding import FoldingBackend, FoldingBuilder, FoldingImpl, WithStep
from adakv_worker.refusals import REFUSED_ON_CPU
from adakv_worker.stored_dtypes import stored_dtype

# Steps of an unchanged batch that share a schedule.
_PLAN_STEPS = 32
# Whole numbers below it are exact in each dtype of a cache.
_EXACT = 8


@dataclass
class AdaKVCPUMetadata(WithStep, CPUAttentionMetadata):
    """Metadata of CPU attention."""


class AdaKVCPUMetadataBuilder(FoldingBuilder, CPUAttentionMetadataBuilder):
    metadata_class = AdaKVCPUMetadata
    _folded: tuple[Tensor, Tensor] | None = None

    def fold(self, grown: GrownStep, requests: int) -> Folded:
        if grown.age % _PLAN_STEPS == 0:
            # A schedule divides the work; the kernel reads from the lengths what to attend to. So
            # one for the longest layer and for the next steps serves all.
            longest = grown.lens.amax(dim=0) + (_PLAN_STEPS - 1)
            self._folded = self._plan(longest)
        assert self._folded is not None
        starts, plan = self._folded
        return Folded(requests, grown, self.pages, starts, 0, requests, plan=plan)

    def fold_extends(self, extended: ExtendedStep, tokens: Sequence[int], first: int) -> Folded:
        folded = super().fold_extends(extended, tokens, first)
        # Which entries a token may see follows from the length, so each layer has a schedule.
        starts = folded.query_start_loc
        return folded._replace(plan=[self._schedule(lens, starts) for lens in extended.lens])

    def _plan(self, lens: Tensor) -> tuple[Tensor, Tensor]:
        query_start_loc = torch.arange(lens.shape[0] + 1, dtype=torch.int32)
        return query_start_loc, self._schedule(lens, query_start_loc)

    def _schedule(self, lens: Tensor, query_start_loc: Tensor) -> Tensor:
        """Return the kernel's division of work for sequences of one KV head."""
        assert isinstance(self.dtype, torch.dtype)
        schedule: Tensor = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=lens.shape[0],
            num_heads=self.num_heads // self.num_kv_heads,
            num_kv_heads=1,
            head_dim=self.head_dim,
            seq_lens=lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.pages.kv_cache_dtype,
        )
        return schedule

    def _nothing(self, common: CommonAttentionMetadata) -> dict[str, Any]:
        return {**super()._nothing(common), "scheduler_metadata": None}


class AdaKVCPUImpl(FoldingImpl, CPUAttentionBackendImpl):
    def _store_folded(
        self, layer: Any, key: Tensor, value: Tensor, pages: Pages, slots: Tensor
    ) -> None:
        ops.cpu_attn_reshape_and_cache(
            key, value, pages.keys, pages.values, slots, layer.isa,
            *self._scales(layer, pages), pages.kv_cache_dtype,
        )  # fmt: skip

    def _attend_folded(
        self, layer: Any, index: int, query: Tensor, output: Tensor, folded: Folded
    ) -> None:
        plan = folded.plan[index] if isinstance(folded.plan, list) else folded.plan
        assert isinstance(plan, Tensor)
        k_scale, v_scale = self._scales(layer, folded.pages)
        ops.cpu_attention_with_kv_cache(
            query=query,
            key_cache=folded.pages.keys,
            value_cache=folded.pages.values,
            output=output,
            query_start_loc=folded.query_start_loc,
            seq_lens=folded.grown.lens[index],
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=folded.grown.tables[index],
            softcap=self.logits_soft_cap,
            scheduler_metadata=plan,
            s_aux=None,
            k_scale=k_scale,
            v_scale=v_scale,
            kv_cache_dtype=folded.pages.kv_cache_dtype,
        )

    def _scales(self, layer: Any, pages: Pages) -> tuple[float, float]:
        """Return what stored keys and values are multiplied with."""
        if pages.kv_cache_dtype != self.kv_cache_dtype:
            # The layer's own are for its blocks.
            return 1.0, 1.0
        return layer._k_scale_float, layer._v_scale_float


class AdaKVCPUBackend(FoldingBackend, CPUAttentionBackend):  # type: ignore[misc]
    """The backend registered in place of vLLM's."""

    refused = REFUSED_ON_CPU
    folding_impl = AdaKVCPUImpl
    folding_builder = AdaKVCPUMetadataBuilder


def paged_cache(pages: Pages, isa: str, dtype: torch.dtype) -> PagedCache:
    """View the memory in logical order [pages, page_tokens, D], found by writing a probe.

    Args:
        dtype: of the keys and values that an engine writes.

    Raises:
        RuntimeError: this CPU's kernels pack a page in an unknown order.
    """
    _, _, page_tokens, dim = pages.keys.shape
    probe = torch.zeros((1, 1, 2 * page_tokens, dim), dtype=pages.keys.dtype)
    keys, values = probe.chunk(2, dim=2)
    stored = stored_dtype(pages.kv_cache_dtype) or dtype
    token = torch.arange(page_tokens)[:, None, None].expand(-1, 1, dim)
    slots, seen = torch.arange(page_tokens), torch.zeros((2, page_tokens * dim), dtype=torch.long)
    # Digit by digit: eight bits are exact up to eight only.
    for digit in range(math.ceil(math.log(page_tokens, _EXACT)) + 1):
        content = (token // _EXACT**digit % _EXACT).to(dtype).contiguous()
        ops.cpu_attn_reshape_and_cache(
            content, content, keys, values, slots, isa,
            kv_cache_dtype=pages.kv_cache_dtype,
        )  # fmt: skip
        for order, written in zip(seen, (keys, values), strict=True):
            order += written[0, 0].reshape(-1).view(stored).long() * _EXACT**digit
    return PagedCache(_logical(pages.keys, seen[0]), _logical(pages.values, seen[1]))


def _logical(pool: Tensor, seen: Tensor) -> Tensor:
    """View a pool in logical order.

    Args:
        seen: [page_tokens * D], the token of each number in a page.
    """
    _, _, page_tokens, dim = pool.shape
    plain = torch.arange(page_tokens)[:, None].expand(-1, dim).reshape(-1)
    packed = torch.arange(page_tokens).repeat(dim)
    rows = pool[:, 0]
    if torch.equal(seen, plain):
        return rows
    if torch.equal(seen, packed):
        stride = rows.stride(0)
        return rows.as_strided((rows.shape[0], page_tokens, dim), (stride, 1, page_tokens))
    raise RuntimeError("adakv: unknown packing of KV pages by this CPU's attention kernels")
