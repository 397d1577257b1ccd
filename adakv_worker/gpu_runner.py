"""The GPU's model runners with compression: blocks outermost, an entry's keys before its values.

What the kernels do on the GPU is registered by importing this.
"""

import torch

import kernels.gpu.compaction
import kernels.gpu.top
import kernels.gpu.window_scores  # noqa: F401
from adakv_worker.config import CompressionConfig
from adakv_worker.folding import Pages
from adakv_worker.runner import AdaKVRunner
from adakv_worker.runner_v1 import AdaKVRunnerV1
from adakv_worker.runner_v2 import AdaKVRunnerV2
from adakv_worker.state import CompressionState
from kernels.gpu.device_tables import DeviceTables
from kernels.paged_cache import PagedCache
from kernels.pages import PageLayout


class BlocksOutermost(AdaKVRunner):
    """For backends that lay a block's layers and heads one after the other (vLLM's BLHNC)."""

    def _bind_pages(self, config: CompressionConfig) -> None:
        layers = self._layers()
        self._adakv_pages = pages = _all_pages([layer.kv_cache for layer in layers])
        _, heads, page_tokens, _ = layers[0].kv_cache.shape
        layout = PageLayout.blocks_outermost(len(layers), heads).to(pages.keys.device)
        self.adakv = CompressionState(
            PagedCache(pages.keys[:, :, 0], pages.values[:, :, 0]),
            DeviceTables(layout, page_tokens, self.vllm_config.scheduler_config.max_num_seqs),
            self._parts(layers),
            record_selections=config.record_selections,
        )


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
