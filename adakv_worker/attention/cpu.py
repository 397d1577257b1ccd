"""CPU attention with compressed requests."""

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

from adakv_worker.attention.folded import Folded, Pages
from adakv_worker.attention.folding import FoldingBackend, FoldingBuilder, FoldingImpl, WithStep
from kernels.paging.growth import ExtendedStep, GrownStep
from kernels.paging.paged_cache import PagedCache

# Steps of an unchanged batch that share a schedule.
_PLAN_STEPS = 32


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
            self._folded = self._plan(longest, self.pages.keys.dtype)
        assert self._folded is not None
        starts, plan = self._folded
        return Folded(requests, grown, self.pages, starts, 0, requests, plan=plan)

    def fold_extends(self, extended: ExtendedStep, tokens: Sequence[int], first: int) -> Folded:
        folded = super().fold_extends(extended, tokens, first)
        # Which entries a token may see follows from the length, so each layer has a schedule.
        dtype, starts = self.pages.keys.dtype, folded.query_start_loc
        return folded._replace(plan=[self._schedule(lens, starts, dtype) for lens in extended.lens])

    def _plan(self, lens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        query_start_loc = torch.arange(lens.shape[0] + 1, dtype=torch.int32)
        return query_start_loc, self._schedule(lens, query_start_loc, dtype)

    def _schedule(self, lens: Tensor, query_start_loc: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the kernel's division of work for sequences of one KV head."""
        schedule: Tensor = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=lens.shape[0],
            num_heads=self.num_heads // self.num_kv_heads,
            num_kv_heads=1,
            head_dim=self.head_dim,
            seq_lens=lens,
            dtype=dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            kv_cache_dtype=self.kv_cache_dtype,
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
            kv_cache_dtype=self.kv_cache_dtype,
        )  # fmt: skip

    def _attend_folded(
        self, layer: Any, index: int, query: Tensor, output: Tensor, folded: Folded
    ) -> None:
        plan = folded.plan[index] if isinstance(folded.plan, list) else folded.plan
        assert isinstance(plan, Tensor)
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
            kv_cache_dtype=self.kv_cache_dtype,
        )


class AdaKVCPUBackend(FoldingBackend, CPUAttentionBackend):  # type: ignore[misc]
    """The backend registered in place of vLLM's."""

    folding_impl = AdaKVCPUImpl
    folding_builder = AdaKVCPUMetadataBuilder


def paged_cache(pages: Pages, isa: str) -> PagedCache:
    """View the memory in logical order [pages, page_tokens, D], found by writing a probe.

    Raises:
        RuntimeError: this CPU's kernels pack a page in an unknown order.
    """
    _, _, page_tokens, dim = pages.keys.shape
    probe = Pages(
        *torch.zeros((1, 1, 2 * page_tokens, dim), dtype=pages.keys.dtype).chunk(2, dim=2)
    )
    token = torch.arange(page_tokens)[:, None, None].expand(-1, 1, dim)
    dimension = torch.arange(dim).expand(page_tokens, 1, -1)
    slots = torch.arange(page_tokens)
    orders = []
    # Token and dimension apart: both are small enough to be exact in 16 bits.
    for number in (token, dimension):
        content = number.to(probe.keys.dtype).contiguous()
        ops.cpu_attn_reshape_and_cache(content, content, probe.keys, probe.values, slots, isa)
        orders.append((probe.keys[0, 0].clone(), probe.values[0, 0].clone()))
    return PagedCache(
        _logical(pages.keys, [order[0] for order in orders]),
        _logical(pages.values, [order[1] for order in orders]),
    )


def _logical(pool: Tensor, orders: list[Tensor]) -> Tensor:
    _, _, page_tokens, dim = pool.shape
    plain = torch.arange(page_tokens)[:, None].expand(-1, dim).reshape(-1)
    packed = torch.arange(page_tokens).repeat(dim)
    seen = orders[0].reshape(-1).long()
    rows = pool[:, 0]
    if torch.equal(seen, plain):
        return rows
    if torch.equal(seen, packed):
        stride = rows.stride(0)
        return rows.as_strided((rows.shape[0], page_tokens, dim), (stride, 1, page_tokens))
    raise RuntimeError("adakv: unknown packing of KV pages by this CPU's attention kernels")
