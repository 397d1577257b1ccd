"""The worker and its model runners on CPUs: one layer's memory after the other."""

import functools
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu.model_runner import CPUModelRunner as CPUModelRunnerV2
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from adakv_serve.kernels.paging.host_tables import HostTables
from adakv_serve.kernels.paging.layout import PageLayout
from adakv_serve.kernels.paging.paged_cache import Conversion, clear_pages, write_in_bytes
from adakv_worker.attention.cpu import paged_cache
from adakv_worker.attention.folded import Pages
from adakv_worker.compiled_products import bound_compiled_products
from adakv_worker.config import CompressionConfig, compression_config
from adakv_worker.refusals import refuse_unsupported
from adakv_worker.stored_dtypes import page_cache_dtype, stored_dtype
from adakv_worker.worker.base import AdaKVRunner, AdaKVWorkerMixin, KVMemory
from adakv_worker.worker.runner_v1 import AdaKVRunnerV1
from adakv_worker.worker.runner_v2 import AdaKVRunnerV2
from adakv_worker.worker.unused_memory import UnusedMemory


class LayersOutermost(AdaKVRunner):
    """Mixin for the CPU's backend, which lays one layer after the other (vLLM's LBHNC)."""

    def _kv_memory(self, config: CompressionConfig, layers: list[Any]) -> KVMemory:
        first, dtype = layers[0], self.model_config.dtype
        blocks = _all_pages([layer.kv_cache for layer in layers], first.kv_cache_dtype)
        pages = _stored_as(blocks, page_cache_dtype(self.vllm_config))
        number, heads, _, _ = first.kv_cache.shape
        layout = PageLayout.layers_outermost(len(layers), heads, number)
        rows = self._most_rows(config)
        slabs, whole = paged_cache(pages, first.isa, dtype), None
        clear = conversion = None
        if pages is not blocks:
            whole = paged_cache(blocks, first.isa, dtype)
            stored = stored_dtype(pages.kv_cache_dtype)
            assert stored is not None
            write = functools.partial(write_in_bytes, slabs, stored)
            conversion = Conversion(pages.keys.shape[2], write)
            # Numbers of a whole prompt, read as numbers of fewer bits, may be infinite or none at
            # all. The kernels read to the end of a page, and multiply what they mask with zero.
            clear = functools.partial(clear_pages, slabs)
        tables = HostTables(layout, pages.keys.shape[2], rows, clear)
        return KVMemory(pages, whole or slabs, slabs, tables, conversion)


class UndrawnNumbers(GPUModelRunner):
    """Mixin placed before vLLM's CPU runner: seeds beside prompts of several chunks.

    vLLM draws a token after each chunk, discards it and turns the generator's offset back. A CPU's
    generator has no offset, and the error ends the engine: this restores its state instead.
    """

    def _seeded_chunks(self) -> dict[int, torch.Generator]:
        """Return the generators, by row, of requests whose prompt is not complete."""
        rows = self.discard_request_mask.np[: self.input_batch.num_reqs].nonzero()[0].tolist()
        generators = self.input_batch.generators
        return {row: generators[row] for row in rows if row in generators}

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        before = [(chunk, chunk.get_state()) for chunk in self._seeded_chunks().values()]
        output = super()._sample(*args, **kwargs)
        for generator, state in before:
            generator.set_state(state)
        return output

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        chunks, generators = self._seeded_chunks(), self.input_batch.generators
        for row in chunks:
            del generators[row]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            generators.update(chunks)


class AdaKVCPUModelRunner(LayersOutermost, AdaKVRunnerV1, UndrawnNumbers, CPUModelRunner):
    """The CPU's runner on Model Runner V1."""


class AdaKVCPUModelRunnerV2(LayersOutermost, AdaKVRunnerV2, CPUModelRunnerV2):
    """The CPU's runner on Model Runner V2, which needs a Triton for CPUs."""


class AdaKVCPUWorker(AdaKVWorkerMixin, CPUWorker):
    """vLLM's CPU worker with compression."""

    _unused_memory: UnusedMemory

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        output = super().execute_model(scheduler_output)
        self._unused_memory.give_back()
        return output

    def init_device(self) -> None:
        bound_compiled_products()
        self._unused_memory = UnusedMemory()
        compresses = compression_config(self.vllm_config.additional_config) is not None
        if compresses:
            refuse_unsupported(self.vllm_config)
        super().init_device()
        if compresses:
            # vLLM's CPU worker makes a stock runner and has no hook to name another.
            runner: Any = AdaKVCPUModelRunnerV2 if self.use_v2_model_runner else AdaKVCPUModelRunner
            self.model_runner = runner(self.vllm_config, self.device)


def _stored_as(blocks: Pages, kv_cache_dtype: str) -> Pages:
    """View the same memory as pages that store numbers so, and have as many more entries."""
    if stored_dtype(kv_cache_dtype) in (None, stored_dtype(blocks.kv_cache_dtype)):
        return blocks
    dim = blocks.keys.shape[-1]

    def viewed(pool: torch.Tensor) -> torch.Tensor:
        pages, bytes_of_a_page = len(pool), pool[0].numel() * pool.element_size()
        stride = pool.stride(0) * pool.element_size()
        start = pool.storage_offset() * pool.element_size()
        memory = torch.empty(0, dtype=torch.uint8).set_(pool.untyped_storage())
        size = (pages, 1, bytes_of_a_page // dim, dim)
        return memory.as_strided(size, (stride, stride, dim, 1), start)

    return Pages(viewed(blocks.keys), viewed(blocks.values), kv_cache_dtype)


def _all_pages(caches: list[torch.Tensor], kv_cache_dtype: str) -> Pages:
    """View the layers' caches [NB, H, page_tokens, 2 * D] as one pool of pages.

    Raises:
        RuntimeError: the caches are not adjacent in one allocation.
    """
    first = caches[0]
    size = first.numel() * first.element_size()
    for index, cache in enumerate(caches):
        if not cache.is_contiguous() or cache.data_ptr() != first.data_ptr() + index * size:
            raise RuntimeError("adakv: the layers' KV caches are not one contiguous allocation")
    blocks, heads, page_tokens, width = first.shape
    pages = len(caches) * blocks * heads
    pool = first.as_strided(
        (pages, 1, 2 * page_tokens, width // 2),
        (page_tokens * width, page_tokens * width, width // 2, 1),
    )
    keys, values = pool.chunk(2, dim=2)
    return Pages(keys, values, kv_cache_dtype)
