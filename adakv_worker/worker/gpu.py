"""The worker and its model runners on CUDA: one block's memory after the other.

Importing this registers the GPU's paths of our kernels.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.gpu_worker import Worker

import adakv_serve.kernels.gpu.compaction
import adakv_serve.kernels.gpu.top
import adakv_serve.kernels.gpu.window_scores  # noqa: F401
from adakv_serve.kernels.gpu.device_tables import DeviceTables
from adakv_serve.kernels.paging.layout import PageLayout
from adakv_serve.kernels.paging.paged_cache import Conversion, PagedCache
from adakv_worker.attention.folded import Pages
from adakv_worker.attention.triton_kernel import store, stored_pages
from adakv_worker.config import CompressionConfig, compression_config
from adakv_worker.refusals import refuse_unsupported
from adakv_worker.stored_dtypes import entry_bytes, has_scales, page_cache_dtype, store_alike
from adakv_worker.worker.base import AdaKVRunner, AdaKVWorkerMixin, KVMemory
from adakv_worker.worker.runner_v1 import AdaKVRunnerV1
from adakv_worker.worker.runner_v2 import AdaKVRunnerV2


class BlocksOutermost(AdaKVRunner):
    """Mixin for backends that lay a block's layers and heads one after the other (vLLM's BLHNC)."""

    def _kv_memory(self, config: CompressionConfig, layers: list[Any]) -> KVMemory:
        pool = _all_pages([layer.kv_cache for layer in layers])
        _, heads, page_tokens, _ = layers[0].kv_cache.shape
        if has_scales(layers[0].kv_cache_dtype):
            for layer in layers:
                # vLLM's first write to a layer's memory sets all scales in it to one. By then other
                # layers' entries may lie in it.
                layer.impl._ensure_scale_caches(layer.kv_cache)
        pages, cache = _in_halves(pool, layers[0].kv_cache_dtype)
        blocks, conversion = cache, None
        page_dtype = page_cache_dtype(self.vllm_config)
        if not store_alike(page_dtype, pages.kv_cache_dtype):
            page_tokens = self._spec().page_tokens
            width = entry_bytes(self.model_config, page_dtype)
            pages, cache = _in_halves(_of_bytes(pool, page_tokens, width), page_dtype)
            pages = pages._replace(scale=torch.ones(1, dtype=torch.float32, device=pool.device))
            conversion = Conversion(page_tokens, functools.partial(_write, pages))
        layout = PageLayout.blocks_outermost(len(layers), heads).to(pages.keys.device)
        most = self.vllm_config.scheduler_config.max_num_seqs
        in_graph = min(most, self.vllm_config.compilation_config.max_cudagraph_capture_size or most)
        columns = self._graph_columns(config, in_graph * len(layers) * heads, page_tokens)
        rows = self._most_rows(config)
        tables = DeviceTables(layout, page_tokens, rows, columns, in_graph)
        queries = None
        if columns and config.decode_budget_tokens is not None:
            # Evictions look at the queries of steps that graphs run.
            shape = (len(layers), in_graph, layers[0].num_heads, layers[0].head_size)
            queries = cache.keys.new_zeros(shape, dtype=self.model_config.dtype)
        return KVMemory(pages, blocks, cache, tables, conversion, queries)

    def _graph_columns(self, config: CompressionConfig, sequences: int, page_tokens: int) -> int:
        """Return the pages of the longest head that full CUDA graphs attend to; 0 without graphs.

        Args:
            sequences: the most that a graph has in all layers.
        """
        mode = self.vllm_config.compilation_config.cudagraph_mode
        if not mode.has_full_cudagraphs() or config.graph_table_bytes == 0:
            return 0
        # Each sequence has a length and a slot beside its page ids.
        affordable = (config.graph_table_bytes // sequences - 12) // 4
        # No head can be longer than the context.
        return max(1, min(affordable, -(-self.model_config.max_model_len // page_tokens)))


class AdaKVGPUModelRunner(BlocksOutermost, AdaKVRunnerV1):
    """The GPU's runner on Model Runner V1."""


class AdaKVGPUModelRunnerV2(BlocksOutermost, AdaKVRunnerV2):
    """The GPU's runner on Model Runner V2."""


class AdaKVGPUWorker(AdaKVWorkerMixin, Worker):
    """vLLM's GPU worker with compression."""

    def init_device(self) -> None:
        if compression_config(self.vllm_config.additional_config) is not None:
            refuse_unsupported(self.vllm_config)
        super().init_device()

    def compile_or_warm_up_model(self) -> Any:
        if isinstance(self.model_runner, AdaKVRunner):
            self.model_runner.warm_up_compression()
        return super().compile_or_warm_up_model()

    # vLLM annotates the result as a Model Runner V1 for both versions.
    def _make_model_runner(self) -> Any:
        if compression_config(self.vllm_config.additional_config) is None:
            return super()._make_model_runner()
        runner: Any = AdaKVGPUModelRunnerV2 if self.use_v2_model_runner else AdaKVGPUModelRunner
        return runner(self.vllm_config, self.device)


def _all_pages(caches: list[Tensor]) -> Tensor:
    """View the layers' caches [NB, H, page_tokens, 2 * D] as a pool [pages, page_tokens, 1, 2 * D].

    If a scale follows each entry's numbers, the pool includes its bytes.

    Raises:
        RuntimeError: a block's layers are not adjacent.
    """
    first = caches[0]
    blocks, heads, page_tokens, width = first.shape
    of_a_layer = heads * page_tokens * width
    strides = (len(caches) * of_a_layer, page_tokens * width, width, 1)
    for index, cache in enumerate(caches):
        place = first.data_ptr() + index * of_a_layer * first.element_size()
        if cache.stride() != strides or cache.data_ptr() != place:
            raise RuntimeError("adakv: the KV caches do not lie block by block (layout BLHNC)")
    return first.as_strided(
        (blocks * len(caches) * heads, page_tokens, 1, width),
        (page_tokens * width, width, width, 1),
    )


def _of_bytes(pool: Tensor, page_tokens: int, width: int) -> Tensor:
    """View the pages of a pool as [pages, page_tokens, 1, width] of bytes."""
    size = pool[0].numel() * pool.element_size()
    memory = pool.view(torch.uint8).view(len(pool), size)
    return memory.as_strided((len(pool), page_tokens, 1, width), (size, width, width, 1))


def _in_halves(pool: Tensor, kv_cache_dtype: str) -> tuple[Pages, PagedCache]:
    """View a pool as keys and values: the numbers that kernels read, and the memory that moves."""
    keys, values = pool.chunk(2, dim=3)
    return stored_pages(keys, values, kv_cache_dtype), PagedCache(keys[:, :, 0], values[:, :, 0])


def _write(pages: Pages, slots: Tensor, keys: Tensor, values: Tensor) -> None:
    """Store keys and values [e, D] at slots [e] int64 of pages that have a scale."""
    assert pages.scale is not None
    store(pages, keys[:, None], values[:, None], slots, pages.scale, pages.scale)
