"""CPU attention with compressed requests: each of their (request, KV head) is one sequence.

The batch has the R compressed decodes first, one token each; stock attention handles the rest.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs
from vllm.config import get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import AttentionLayer, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from adakv_worker.compression import Watcher
from adakv_worker.config import compression_config
from adakv_worker.manager import AdaKVSpec
from adakv_worker.support import require_classes
from kernels.growth import GrownStep
from kernels.paged_cache import PagedCache

# Steps of an unchanged batch that share a plan.
_PLAN_STEPS = 32


class Pages(NamedTuple):
    """The whole KV memory as the kernels' caches of one KV head: [pages, 1, page_tokens, D]."""

    keys: Tensor
    values: Tensor


class FoldedPlan(NamedTuple):
    """The kernel's plan for R * H sequences of one token: query_start_loc [R * H + 1] int32."""

    query_start_loc: Tensor
    metadata: Tensor


class FoldedDecode(NamedTuple):
    """The compressed decodes of one step, R requests of H KV heads each.

    plan: good for all layers.
    """

    requests: int
    grown: GrownStep
    plan: FoldedPlan
    pages: Pages


class Step(NamedTuple):
    """What the runner adds to a step's attention metadata."""

    folded: FoldedDecode | None
    watchers: list[Watcher]


@dataclass
class AdaKVCPUMetadata(CPUAttentionMetadata):
    """Stock metadata of the rows after the folded ones, and the step.

    has_rest: whether there are such rows.
    """

    step: Step | None = None
    has_rest: bool = True


class AdaKVCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    # Set by the runner before each build, and taken by it.
    next_step: Step | None = None
    _folded_plan: FoldedPlan | None = None

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        step, self.next_step = self.next_step, None
        if step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)
        folded = step.folded.requests if step.folded is not None else 0
        common = _without_first(common_attn_metadata, folded)
        if common.num_reqs == 0:
            return _only_folded(common, step)
        stock = super().build(common_prefix_len, common, fast_build)
        return AdaKVCPUMetadata(**vars(stock), step=step)

    def fold(self, grown: GrownStep, requests: int, pages: Pages) -> FoldedDecode:
        """Plans attention for R compressed decodes."""
        if grown.age % _PLAN_STEPS == 0:
            # A plan divides the work; what is attended to, the kernel takes from the lengths. So
            # one for the longest layer, and for the steps to come, serves all.
            longest = grown.lens.amax(dim=0) + (_PLAN_STEPS - 1)
            self._folded_plan = self._plan(longest, pages.keys.dtype)
        assert self._folded_plan is not None
        return FoldedDecode(requests, grown, self._folded_plan, pages)

    def _plan(self, lens: Tensor, dtype: torch.dtype) -> FoldedPlan:
        sequences = lens.shape[0]
        query_start_loc = torch.arange(sequences + 1, dtype=torch.int32)
        metadata = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=sequences,
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
        return FoldedPlan(query_start_loc, metadata)


def _without_first(common: CommonAttentionMetadata, count: int) -> CommonAttentionMetadata:
    """The metadata of the rows after the first `count`, which have one token each."""
    if count == 0:
        return common
    return replace(
        common,
        query_start_loc=common.query_start_loc[count:] - count,
        query_start_loc_cpu=common.query_start_loc_cpu[count:] - count,
        seq_lens=common.seq_lens[count:],
        num_reqs=common.num_reqs - count,
        num_actual_tokens=common.num_actual_tokens - count,
        block_table_tensor=common.block_table_tensor[count:],
        slot_mapping=common.slot_mapping[count:],
    )


def _only_folded(common: CommonAttentionMetadata, step: Step) -> AdaKVCPUMetadata:
    return AdaKVCPUMetadata(
        num_actual_tokens=0,
        max_query_len=0,
        query_start_loc=common.query_start_loc,
        max_seq_len=0,
        seq_lens=common.seq_lens,
        block_table=common.block_table_tensor,
        slot_mapping=common.slot_mapping,
        scheduler_metadata=None,
        step=step,
        has_rest=False,
    )


class AdaKVCPUImpl(CPUAttentionBackendImpl):
    def do_kv_cache_update(
        self,
        layer: Any,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        metadata = _metadata_of(layer)
        folded = metadata.step.folded if metadata is not None and metadata.step else None
        if folded is None:
            super().do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        count = folded.requests
        ops.cpu_attn_reshape_and_cache(
            _fold(key[:count], 1),
            _fold(value[:count], 1),
            folded.pages.keys,
            folded.pages.values,
            folded.grown.slots[layer.adakv_index],
            layer.isa,
            kv_cache_dtype=self.kv_cache_dtype,
        )
        if metadata is not None and metadata.has_rest:
            super().do_kv_cache_update(
                layer, key[count:], value[count:], kv_cache, slot_mapping[count:]
            )

    def forward(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: CPUAttentionMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        step = attn_metadata.step if isinstance(attn_metadata, AdaKVCPUMetadata) else None
        if attn_metadata is None or step is None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        index = layer.adakv_index  # type: ignore[attr-defined]
        count = 0
        if step.folded is not None:
            count = step.folded.requests
            self._attend_folded(layer, index, query[:count], output[:count], step.folded)
        if attn_metadata.has_rest:  # type: ignore[attr-defined]
            super().forward(
                layer, query[count:], key, value, kv_cache, attn_metadata, output[count:],
                output_scale, output_block_scale,
            )  # fmt: skip
        for watcher in step.watchers:
            watcher.see(index, query)
        return output

    def _attend_folded(
        self, layer: AttentionLayer, index: int, query: Tensor, output: Tensor, folded: FoldedDecode
    ) -> None:
        ops.cpu_attention_with_kv_cache(
            query=_fold(query, self.num_queries_per_kv),
            key_cache=folded.pages.keys,
            value_cache=folded.pages.values,
            output=output.view(-1, self.num_queries_per_kv, self.head_size),
            query_start_loc=folded.plan.query_start_loc,
            seq_lens=folded.grown.lens[index],
            scale=self.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=folded.grown.tables[index],
            softcap=self.logits_soft_cap,
            scheduler_metadata=folded.plan.metadata,
            s_aux=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )


def _fold(x: Tensor, heads: int) -> Tensor:
    """[R, H * heads, D] -> [R * H, heads, D]: the KV heads join the batch."""
    return x.reshape(-1, heads, x.shape[-1])


def _metadata_of(layer: Any) -> AdaKVCPUMetadata | None:
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, dict):
        found = metadata.get(layer.layer_name)
        return found if isinstance(found, AdaKVCPUMetadata) else None
    return None


class AdaKVCPUBackend(CPUAttentionBackend):
    """Registered in place of vLLM's; identical to it where compression is off."""

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        spec = super().customize_spec(spec)
        if type(spec) is FullAttentionSpec and _is_on():
            return AdaKVSpec(**vars(spec))
        return spec

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        return AdaKVCPUImpl if _is_on() else CPUAttentionBackendImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        return AdaKVCPUMetadataBuilder if _is_on() else CPUAttentionMetadataBuilder


def _is_on() -> bool:
    config = get_current_vllm_config_or_none()
    if config is None or compression_config(config.additional_config) is None:
        return False
    require_classes(config)
    return True


def paged_cache(pages: Pages, isa: str) -> PagedCache:
    """The same memory in logical order [pages, page_tokens, D], found by writing a probe.

    Raises:
        RuntimeError: this CPU's kernels pack a page in an order that we do not know.
    """
    _, _, page_tokens, dim = pages.keys.shape
    probe = Pages(
        *torch.zeros((1, 1, 2 * page_tokens, dim), dtype=pages.keys.dtype).chunk(2, dim=2)
    )
    token = torch.arange(page_tokens)[:, None, None].expand(-1, 1, dim)
    dimension = torch.arange(dim).expand(page_tokens, 1, -1)
    slots = torch.arange(page_tokens)
    orders = []
    # One number at a time: small enough to be exact in 16 bits.
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
