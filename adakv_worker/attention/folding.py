"""Attention to compressed requests in any backend: each (request, KV head) is its own sequence.

A batch has its compressed decodes first, then the compressed requests that take several tokens in
this step; the stock backend handles the rest. Our backends are stock ones with these mixins placed
before them.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config, get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec

from adakv_serve.kernels.paging.growth import ExtendedStep, GrownStep
from adakv_serve.kernels.paging.pages import PageTables
from adakv_serve.kernels.transfer import sent
from adakv_worker.attention.folded import Folded, Pages, Step
from adakv_worker.config import compression_config
from adakv_worker.refusals import refuse_unsupported, require_classes
from adakv_worker.spec import AdaKVSpec
from adakv_worker.stored_dtypes import page_cache_dtype, page_tokens


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
    # Memory [L, rows, Hq, D] for the queries of full CUDA graphs, if something looks at them.
    graph_queries: Tensor | None = None
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
        common = without_first(common_attn_metadata, step.stock_row, step.stock_token)
        if common.num_reqs == 0:
            return self.metadata_class(**self._nothing(common), step=step, has_rest=False)
        stock = super().build(common_prefix_len, common, fast_build)  # type: ignore[safe-super]
        return self.metadata_class(**vars(stock), step=step)

    def fold(self, grown: GrownStep, requests: int) -> Folded:
        """Prepare attention for R compressed decodes."""
        raise NotImplementedError

    def fold_for_graph(self, grown: GrownStep, compressed: int) -> Folded:
        """Prepare attention for all rows of a CUDA graph, the first of which are compressed."""
        raise NotImplementedError

    def fold_extends(self, extended: ExtendedStep, tokens: Sequence[int], first: int) -> Folded:
        """Prepare attention for R compressed requests with `tokens` [R] each.

        Args:
            first: the batch's token with which they begin.
        """
        device, heads = extended.lens.device, self.tables.heads
        starts = [0, *itertools.accumulate(count for count in tokens for _ in range(heads))]
        head = torch.arange(heads, device=device)[:, None]
        order, start = [], 0
        for count in tokens:
            token = torch.arange(start, start + count, device=device)
            order.append((token * heads + head).flatten())
            start += count
        return Folded(
            len(tokens), extended, self.pages, sent(starts, device).int(), first, start,
            max(tokens), torch.cat(order),
        )  # fmt: skip

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


def without_first(
    common: CommonAttentionMetadata, count: int, tokens: int
) -> CommonAttentionMetadata:
    """Return the metadata of the rows after the first `count`, which have `tokens` in all."""
    if count == 0:
        return common
    by_request = {
        name: value[count:]
        for name in ("is_prefilling", "seq_lens_cpu_upper_bound", "req_idx")
        if (value := getattr(common, name)) is not None
    }
    # vLLM names the ranges of image tokens that attend to each other by their row.
    if (ranges := common.mm_req_doc_ranges) is not None:
        by_request["mm_req_doc_ranges"] = {
            row - count: of_row for row, of_row in ranges.items() if row >= count
        }
    # Cached results for the whole batch are wrong for a part.
    caches = [field.name for field in fields(common) if field.name.endswith("_cache")]
    return replace(
        common,
        query_start_loc=common.query_start_loc[count:] - tokens,
        query_start_loc_cpu=common.query_start_loc_cpu[count:] - tokens,
        seq_lens=common.seq_lens[count:],
        num_reqs=common.num_reqs - count,
        num_actual_tokens=common.num_actual_tokens - tokens,
        block_table_tensor=common.block_table_tensor[count:],
        slot_mapping=common.slot_mapping[tokens:],
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
        step = metadata.step if metadata is not None else None
        if metadata is None or step is None or not step.folded:
            stock.do_kv_cache_update(layer, key, value, kv_cache, slot_mapping)
            return
        for folded in step.folded:
            rows = folded.rows
            self._store_folded(
                layer, fold(key[rows], 1), fold(value[rows], 1), folded.pages,
                folded.grown.slots[layer.adakv_index],
            )  # fmt: skip
        if metadata.has_rest:
            rest = step.stock_token
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
        index, masked = layer.adakv_index, None
        if step.decodes is not None:
            masked = self._attend_decodes(layer, index, query, output, step.decodes)
        if step.extends is not None:
            self._attend_extends(layer, index, query, output, step.extends)
        if attn_metadata.has_rest:
            rest = step.stock_token
            stock.forward(
                layer, query[rest:], key, value, kv_cache, attn_metadata, output[rest:],
                output_scale, output_block_scale,
            )  # fmt: skip
        if masked is not None and step.decodes is not None and step.decodes.mask is not None:
            mask = step.decodes.mask.view(-1, *[1] * (output.dim() - 1))
            stocks = output[: len(mask)]
            torch.where(mask, masked, stocks, out=stocks)
        for watcher in step.watchers:
            watcher.see(index, query)
        return output

    def _attend_decodes(
        self, layer: Any, index: int, query: Tensor, output: Tensor, folded: Folded
    ) -> Tensor | None:
        """Attend for compressed decodes; in a graph return the result for all rows instead."""
        rows, group = folded.rows, self.num_heads // self.num_kv_heads
        if folded.queries is not None:
            folded.queries[index].copy_(query[rows])
        attended = output[rows] if folded.mask is None else torch.empty_like(output[rows])
        by_head = attended.view(-1, group, self.head_size)
        self._attend_folded(layer, index, fold(query[rows], group), by_head, folded)
        return None if folded.mask is None else attended

    def _attend_extends(
        self, layer: Any, index: int, query: Tensor, output: Tensor, folded: Folded
    ) -> None:
        """Attend for compressed requests with several tokens, each token to those before it."""
        rows, group = folded.rows, self.num_heads // self.num_kv_heads
        queries = fold(query[rows], group)[folded.order]
        attended = torch.empty_like(queries)
        self._attend_folded(layer, index, queries, attended, folded)
        output[rows].view(-1, group, self.head_size)[folded.order] = attended

    def _store_folded(
        self, layer: Any, key: Tensor, value: Tensor, pages: Pages, slots: Tensor
    ) -> None:
        """Write key and value [tokens * H, 1, D] to slots [tokens * H] of the pages."""
        raise NotImplementedError

    def _attend_folded(
        self, layer: Any, index: int, query: Tensor, output: Tensor, folded: Folded
    ) -> None:
        """Attend for the folded sequences.

        Args:
            index: the layer's index in the cache.
            query, output: [tokens * H, group, D], in the order of `query_start_loc`.
        """
        raise NotImplementedError


def fold(x: Tensor, heads: int) -> Tensor:
    """Turn [T, H * heads, D] into [T * H, heads, D]: the KV heads join the batch."""
    return x.reshape(-1, heads, x.shape[-1])


def _metadata_of(layer: Any) -> WithStep | None:
    metadata = get_forward_context().attn_metadata
    if isinstance(metadata, dict):
        found = metadata.get(layer.layer_name)
        return found if isinstance(found, WithStep) else None
    return None


class FoldingBackend(AttentionBackend):
    """Mixin placed before a stock backend, which it leaves as it is without compression.

    refused: settings with which its kernels do not work, see `refuse_unsupported`.
    """

    refused: ClassVar[Mapping[str, Callable[[VllmConfig], bool]]]
    folding_impl: ClassVar[type[FoldingImpl]]
    folding_builder: ClassVar[type[FoldingBuilder]]

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        spec = super().customize_spec(spec)
        if type(spec) is FullAttentionSpec and is_on():
            config = get_current_vllm_config()
            tokens = page_tokens(
                config.model_config,
                spec.block_size,
                config.cache_config.cache_dtype,
                page_cache_dtype(config),
            )
            return AdaKVSpec(**vars(spec), entries_of_a_page=tokens)
        return spec

    @classmethod
    def get_impl_cls(cls) -> type[AttentionImpl[Any]]:
        stock: Any = super()
        if not is_on():
            return stock.get_impl_cls()
        refuse_unsupported(get_current_vllm_config(), cls.refused)
        return cls.folding_impl

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
