"""The GPU's model runners with compression: blocks outermost, an entry's keys before its values.

What the kernels do on the GPU is registered by importing this.
"""

from collections.abc import Collection

import torch
from vllm.distributed.parallel_state import get_tp_group

import kernels.gpu.compaction
import kernels.gpu.top
import kernels.gpu.window_scores  # noqa: F401
from adakv_worker.attention.folding import Pages
from adakv_worker.config import CompressionConfig
from adakv_worker.worker.requests import CompressionState
from adakv_worker.worker.runner_v1 import AdaKVRunnerV1
from adakv_worker.worker.runner_v2 import AdaKVRunnerV2
from adakv_worker.worker.step import AdaKVRunner
from kernels.gpu.device_tables import DeviceTables
from kernels.paging.paged_cache import PagedCache
from kernels.paging.pages import PageLayout


class BlocksOutermost(AdaKVRunner):
    """For backends that lay a block's layers and heads one after the other (vLLM's BLHNC)."""

    _adakv_tables: DeviceTables

    def _bind_pages(self, config: CompressionConfig) -> None:
        layers = self._layers()
        self._adakv_pages = pages = _all_pages([layer.kv_cache for layer in layers])
        _, heads, page_tokens, _ = layers[0].kv_cache.shape
        layout = PageLayout.blocks_outermost(len(layers), heads).to(pages.keys.device)
        most = self.vllm_config.scheduler_config.max_num_seqs
        # Graphs of more tokens there are none.
        in_graph = min(most, self.vllm_config.compilation_config.max_cudagraph_capture_size or most)
        self._adakv_tables = DeviceTables(
            layout,
            page_tokens,
            most,
            self._graph_columns(config, in_graph * len(layers) * heads, page_tokens),
            in_graph,
        )
        self.adakv = CompressionState(
            PagedCache(pages.keys[:, :, 0], pages.values[:, :, 0]),
            self._adakv_tables,
            self._parts(layers),
            record_selections=config.record_selections,
        )
        for group in self.attn_groups[0]:
            builder = group.get_metadata_builder()
            builder.tables, builder.pages = self._adakv_tables, pages

    def _graph_columns(self, config: CompressionConfig, sequences: int, page_tokens: int) -> int:
        """Pages of the longest head that full CUDA graphs can attend to; 0: there are none.

        Args:
            sequences: most that a graph has in all layers.
        """
        mode = self.vllm_config.compilation_config.cudagraph_mode
        if not mode.has_full_cudagraphs() or config.graph_table_bytes == 0:
            return 0
        # Each sequence has its length and its slot beside its page ids.
        affordable = (config.graph_table_bytes // sequences - 12) // 4
        # No head can be longer than the context.
        return max(1, min(affordable, -(-self.model_config.max_model_len // page_tokens)))

    def _lengths_changed(self, request_ids: Collection[str]) -> None:
        group = get_tp_group()
        if not request_ids or group.world_size == 1:
            return
        # Each rank has heads of its own, and either all ranks replay a graph or none.
        tables, rows = self._adakv_tables, self.adakv.rows(request_ids)
        longest = torch.tensor([tables.longest(row) for row in rows])
        torch.distributed.all_reduce(
            longest, op=torch.distributed.ReduceOp.MAX, group=group.cpu_group
        )
        for row, entries in zip(rows, longest.tolist(), strict=True):
            tables.take_for_longest(row, entries)


class AdaKVGPUModelRunner(BlocksOutermost, AdaKVRunnerV1):
    """CUDA, on Model Runner V1."""


class AdaKVGPUModelRunnerV2(BlocksOutermost, AdaKVRunnerV2):
    """CUDA, on Model Runner V2."""


def _all_pages(caches: list[torch.Tensor]) -> Pages:
    """Views the layers' caches [NB, H, page_tokens, 2 * D] as pools [pages, page_tokens, 1, D].

    Raises:
        RuntimeError: a block's layers do not lie one after the other.
    """
    first = caches[0]
    blocks, heads, page_tokens, width = first.shape
    of_a_layer = heads * page_tokens * width
    strides = (len(caches) * of_a_layer, page_tokens * width, width, 1)
    for index, cache in enumerate(caches):
        place = first.data_ptr() + index * of_a_layer * first.element_size()
        if cache.stride() != strides or cache.data_ptr() != place:
            raise RuntimeError("adakv: the KV caches do not lie block by block (layout BLHNC)")
    pool = first.as_strided(
        (blocks * len(caches) * heads, page_tokens, 1, width),
        (page_tokens * width, width, width, 1),
    )
    return Pages(*pool.chunk(2, dim=3))
