"""Quantized caches that can be scored: those whose numbers have one scale for each layer."""

import torch
from vllm.utils.torch_utils import is_quantized_kv_cache

# By vLLM's `kv_cache_dtype`.
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
