"""The CPU's model runner with compression: layers outermost, pages packed as its kernels want."""

import torch
from vllm.v1.worker.cpu.model_runner import CPUModelRunner as CPUModelRunnerV2
from vllm.v1.worker.cpu_model_runner import CPUModelRunner

from adakv_worker.config import CompressionConfig
from adakv_worker.cpu_backend import paged_cache
from adakv_worker.folding import Pages
from adakv_worker.runner import AdaKVRunner
from adakv_worker.runner_v1 import AdaKVRunnerV1
from adakv_worker.runner_v2 import AdaKVRunnerV2
from adakv_worker.state import CompressionState
from kernels.pages import PageLayout, PageTables


class LayersOutermost(AdaKVRunner):
    """For the CPU's backend, which lays one layer after the other (vLLM's LBHNC)."""

    def _bind_pages(self, config: CompressionConfig) -> None:
        layers = self._layers()
        self._adakv_pages = _all_pages([layer.kv_cache for layer in layers])
        blocks, heads, page_tokens, _ = layers[0].kv_cache.shape
        layout = PageLayout.layers_outermost(len(layers), heads, blocks)
        self.adakv = CompressionState(
            paged_cache(self._adakv_pages, layers[0].isa),
            PageTables(layout, page_tokens, self.vllm_config.scheduler_config.max_num_seqs),
            self._parts(layers),
            record_selections=config.record_selections,
        )


class AdaKVCPUModelRunner(LayersOutermost, AdaKVRunnerV1, CPUModelRunner):
    """The CPU, on Model Runner V1."""


class AdaKVCPUModelRunnerV2(LayersOutermost, AdaKVRunnerV2, CPUModelRunnerV2):
    """The CPU, on Model Runner V2, which wants a Triton for CPUs."""


def _all_pages(caches: list[torch.Tensor]) -> Pages:
    """Views the layers' caches [NB, H, page_tokens, 2 * D] as one pool of pages.

    Raises:
        RuntimeError: they do not lie one after the other in one allocation.
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
    return Pages(*pool.chunk(2, dim=2))
