"""How caches store numbers: blocks of whole prompts, and pages of compressed ones."""

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.utils.torch_utils import is_quantized_kv_cache, kv_cache_dtype_str_to_dtype

from adakv_worker.config import compression_config

# By vLLM's `kv_cache_dtype`: quantized caches whose numbers have one scale for each layer.
_STORED = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def is_unreadable(kv_cache_dtype: str) -> bool:
    """Return whether a cache is quantized in a way that scorers cannot read."""
    return is_quantized_kv_cache(kv_cache_dtype) and kv_cache_dtype not in _STORED


def stored_dtype(kv_cache_dtype: str) -> torch.dtype | None:
    """Return the dtype of a quantized cache's numbers; None if the cache is not quantized."""
    return _STORED.get(kv_cache_dtype)


def page_cache_dtype(config: VllmConfig) -> str:
    """Return how pages store numbers, by vLLM's `kv_cache_dtype`."""
    compression = compression_config(config.additional_config)
    cache_dtype = config.cache_config.cache_dtype
    if compression is None or compression.chosen_page_dtype == "auto":
        return cache_dtype
    return compression.chosen_page_dtype


def page_ratio(model: ModelConfig, cache_dtype: str, page_dtype: str) -> int:
    """Return the entries of a page for each token of a block.

    Args:
        cache_dtype: of blocks, by vLLM's `kv_cache_dtype`.
        page_dtype: of pages, as there or as in the settings.
    """
    page = stored_dtype(page_dtype)
    if page is None:
        return 1
    return int(kv_cache_dtype_str_to_dtype(cache_dtype, model).itemsize // page.itemsize)
