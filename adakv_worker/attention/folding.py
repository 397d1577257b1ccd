"""Attention to compressed requests in any backend: each (request, KV head) is its own sequence.

A batch has its R compressed decodes first; the stock backend handles the rest. Our backends are
stock ones with these mixins placed before them.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from adakv_worker.attention.watcher import Watcher
from adakv_worker.config import compression_config
from adakv_worker.refusals import require_classes
from adakv_worker.spec import AdaKVSpec
from kernels.paging.growth import GrownStep
from kernels.paging.pages import PageTables


class Pages(NamedTuple):
    """The whole KV memory, in the shape of the kernels' caches of one KV head.

    keys, values: [pages, 1, page_tokens, D] on CPU, [pages, page_tokens, 1, D] on CUDA.
    """

    keys: Tensor
    values: Tensor


class FoldedDecode(NamedTuple):
    """The compressed decodes of one step, R requests of H KV heads each.

    In a CUDA graph R is the whole batch: the folded call and the stock call both attend for all
    rows, and `mask` selects between them.

    query_start_loc: [R * H + 1] int32.
    plan: the backend's own preparation of the step, good for all layers.
    mask: [R] bool, the compressed rows; None outside a graph.
    """

    requests: int
    grown: GrownStep
    pages: Pages
    query_start_loc: Tensor
    plan: object = None
    mask: Tensor | None = None

    @property
    def stock_from(self) -> int:
        """First row of the batch for the stock call."""
        return self.requests if self.mask is None else 0


class Step(NamedTuple):
    """Our additions to a step's attention metadata."""

    folded: FoldedDecode | None
    watchers: list[Watcher]


@dataclass
class WithStep:
    """Mixin for stock metadata, which then describes the rows of the stock call only.

    has_rest: whether there are such rows.
    """

    step: Step | None = None
    has_rest: bool = True


class FoldingBuilder(AttentionMetadataBuilder[Any]):
    """Mixin placed before a stock builder; removes the folded rows from its batch if it can."""

    # Set by the step work: the KV memory and its tables once, the step before each build.
    pages: Pages
    tables: PageTables
    next_step: Step | None = None
    # A stock metadata class with `WithStep`.
    metadata_class: ClassVar[Callable[..., Any]]

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> Any:
        step, self.next_step = self.next_step, None
        if step is None:
            return super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[safe-super]
        folded = step.folded.stock_from if step.folded is not None else 0
        common = _without_first(common_attn_metadata, folded)
        if common.num_reqs == 0:
            return self.metadata_class(**self._nothing(common), step=step, has_rest=False)
        stock = super().build(common_prefix_len, common, fast_build)  # type: ignore[safe-super]
        return self.metadata_class(**vars(stock), step=step)

    def fold(self, grown: GrownStep, requests: int) -> FoldedDecode:
        """Prepare attention for R compressed decodes."""
        raise NotImplementedError

    def fold_for_graph(self, grown: GrownStep, compressed: int) -> FoldedDecode:
        """Prepare attention for all rows of a CUDA graph, the first of which are compressed."""
        raise NotImplementedError

    def _nothing(self, common: CommonAttentionMetadata) -> dict[str, Any]:
        """Return the required fields of stock metadata without rows."""
        return {
            "num_actual_tokens": 0,
            "max_query_len": 0,
            "query_start_loc": common.query_start_loc,
            "max_seq_len": 0,
            "seq_lens": common.seq_lens,
            "block_table": common.block_table_tensor,
            "slot_mapping": common.slot_mapping,
        }


def _without_first(common: CommonAttentionMetadata, count: int) -> CommonAttentionMetadata:
    """Return the metadata of the rows after the first `count`, which have one token each."""
    if count == 0:
        return common
    by_request = {
        name: value[count:]
        for name in ("is_prefilling", "seq_lens_cpu_upper_bound", "req_idx")
        if (value := getattr(common, name)) is not None
    }
    # Cached results for the whole batch are wrong for a part.
    caches = [field.name for field in fields(common) if field.name.endswith("_cache")]
    return replace(
        common,
        query_start_loc=common.query_start_loc[count:] - count,
        query_start_loc_cpu=common.query_start_loc_cpu[count:] - count,
        seq_lens=common.seq_lens[count:],
        num_reqs=common.num_reqs - count,
        num_actual_tokens=common.num_actual_tokens - count,
        block_table_tensor=common.block_table_tensor[count:],
        slot_mapping=common.slot_mapping[count:],
        **by_request,
        **dict.fromkeys(caches),  # type: ignore[arg-type]
    )


class FoldingImpl(AttentionImpl[Any]):
    """Mixin placed before a stock implementation; attends for folded rows and calls watchers."""

    num_kv_heads: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[safe-super]
        # Both depend on query head and position, which a folded sequence does not have.
        for name in ("alibi_slopes", "sinks"):
            if getattr(self, name, None) is not None:
                raise ValueError(f"adakv: compression does not work with a model's {name}")

    def fused_output_quant_supported(self, quant_key: Any) -> bool:
        return False

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        stock: Any = super()
        metadata = _metadata_of(layer)
        folded = metadata.step.folded if metadata is not None and metadata.step else None
        if metadata is None or folded is None:
            stock.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        count, rest = folded.requests, folded.stock_from
        self._store_folded(
            layer, fold(key[:count], 1), fold(value[:count], 1), folded.pages,
            folded.grown.slots[layer.adakv_index],
        )  # fmt: skip
        if metadata.has_rest:
            stock.do_kv_cache_update(layer, key[rest:], value[rest:], kv_cache, slot_mapping[rest:])

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        stock: Any = super()
        step = attn_metadata.step if isinstance(attn_metadata, WithStep) else None
        if step is None:
            return stock.forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        index, folded = layer.adakv_index, step.folded
        rest = folded.stock_from if folded is not None else 0
        attended = output
        if folded is not None:
            count, group = folded.requests, self.num_heads // self.num_kv_heads
            attended = output[:count] if folded.mask is None else torch.empty_like(output[:count])
            by_head = attended.view(-1, group, self.head_size)
            self._attend_folded(layer, index, fold(query[:count], group), by_head, folded)
        if attn_metadata.has_rest:
            stock.forward(
                layer, query[rest:], key, value, kv_cache, attn_metadata, output[rest:],
                output_scale, output_block_scale,
            )  # fmt: skip
        if folded is not None and folded.mask is not None:
            mask = folded.mask.view(-1, *[1] * (output.dim() - 1))
            stocks = output[: len(mask)]
            stocks.copy_(torch.where(mask, attended, stocks))
        for watcher in step.watchers:
            watcher.see(index, query)
        return output

    def _store_folded(
        self, layer: Any, key: Tensor, value: Tensor, pages: Pages, slots: Tensor
    ) -> None:
        """Write key and value [R * H, 1, D] to slots [R * H] of the pages."""
        raise NotImplementedError

    def _attend_folded(
        self, layer: Any, index: int, query: Tensor, output: Tensor, folded: FoldedDecode
    ) -> None:
        """Attend for the folded sequences.

        Args:
            index: the layer's index in the cache.
            query, output: [R * H, group, D].
        """
        raise NotImplementedError


def fold(x: Tensor, heads: int) -> Tensor:
    """Turn [R, H * heads, D] into [R * H, heads, D]: the KV heads join the batch."""
    return x.reshape(-1, heads, x.shape[-1])


def _metadata_of(layer: Any) -> WithStep | None:
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, dict):
        found = metadata.get(layer.layer_name)
        return found if isinstance(found, WithStep) else None
    return None


class FoldingBackend(AttentionBackend):
    """Mixin placed before a stock backend, which it leaves as it is without compression."""

    folding_impl: ClassVar[type[FoldingImpl]]
    folding_builder: ClassVar[type[FoldingBuilder]]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        spec = super().customize_spec(spec)
        if type(spec) is FullAttentionSpec and is_on():
            return AdaKVSpec(**vars(spec))
        return spec

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImpl[Any]]:
        stock: Any = super()
        return cls.folding_impl if is_on() else stock.get_impl_cls()

    @classmethod
    def get_builder_cls(cls) -> type[AttentionMetadataBuilder[Any]]:
        stock: Any = super()
        return cls.folding_builder if is_on() else stock.get_builder_cls()


def is_on() -> bool:
    """Return whether the engine that is being built compresses.

    Raises:
        ValueError: its settings turn compression on, but its classes are stock.
    """
    config = get_current_vllm_config_or_none()
    if config is None or compression_config(config.additional_config) is None:
        return False
    require_classes(config)
    return True
