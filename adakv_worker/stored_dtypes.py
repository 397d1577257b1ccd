"""How caches store numbers: blocks of whole prompts, and pages of compressed ones."""

from typing import NamedTuple

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.utils.torch_utils import is_quantized_kv_cache, kv_cache_dtype_str_to_dtype

from adakv_worker.config import compression_config


class _Stored(NamedTuple):
    """The numbers of a quantized cache.

    dtype: of a number; uint8 where a byte has two numbers of four bits.
    has_scales: whether a scale of each entry's own follows its numbers. Otherwise a layer has one.
    """

    dtype: torch.dtype
    has_scales: bool = False


# By vLLM's `kv_cache_dtype`.
_STORED = {
    "fp8": _Stored(torch.float8_e4m3fn),
    "fp8_e4m3": _Stored(torch.float8_e4m3fn),
    "fp8_e5m2": _Stored(torch.float8_e5m2),
    "int8_per_token_head": _Stored(torch.int8, has_scales=True),
    "fp8_per_token_head": _Stored(torch.float8_e4m3fn, has_scales=True),
    "int4_per_token_head": _Stored(torch.uint8, has_scales=True),
}
# The formats of `page_dtype` that have another name in vLLM.
_WITH_SCALES = {"int8": "int8_per_token_head", "int4": "int4_per_token_head"}


def is_unreadable(kv_cache_dtype: str) -> bool:
    """Return whether a cache is quantized in a way that scorers cannot read."""
    return is_quantized_kv_cache(kv_cache_dtype) and kv_cache_dtype not in _STORED


def stored_dtype(kv_cache_dtype: str) -> torch.dtype | None:
    """Return the dtype of a quantized cache's numbers; None if the cache is not quantized.

    It is uint8 where a byte has two numbers of four bits.
    """
    stored = _STORED.get(kv_cache_dtype)
    return None if stored is None else stored.dtype


def has_scales(kv_cache_dtype: str) -> bool:
    """Return whether each entry of a cache has a scale of its own, behind its numbers."""
    return kv_cache_dtype in _STORED and _STORED[kv_cache_dtype].has_scales


def store_alike(one: str, other: str) -> bool:
    """Return whether two values of `kv_cache_dtype` store numbers alike."""
    return one == other or (one in _STORED and _STORED[one] == _STORED.get(other))


def page_cache_dtype(config: VllmConfig) -> str:
    """Return how pages store numbers, by vLLM's `kv_cache_dtype`."""
    compression = compression_config(config.additional_config)
    page_dtype = "auto" if compression is None else compression.chosen_page_dtype
    return pages_stored_as(config.cache_config.cache_dtype, page_dtype)


def pages_stored_as(cache_dtype: str, page_dtype: str) -> str:
    """Return how pages store numbers, by vLLM's `kv_cache_dtype`.

    Args:
        cache_dtype: of blocks, by vLLM's `kv_cache_dtype`.
        page_dtype: as in the settings of compression.
    """
    return cache_dtype if page_dtype == "auto" else _WITH_SCALES.get(page_dtype, page_dtype)


def page_tokens(model: ModelConfig, block_size: int, cache_dtype: str, page_dtype: str) -> int:
    """Return the entries of a page, rounded down: it has the bytes of a block's tokens of a head.

    Args:
        cache_dtype, page_dtype: see `pages_stored_as`.
    """
    stored = pages_stored_as(cache_dtype, page_dtype)
    return block_size * entry_bytes(model, cache_dtype) // entry_bytes(model, stored)


def entry_bytes(model: ModelConfig, cache_dtype: str) -> int:
    """Return the bytes of an entry's keys and values in one head of a cache."""
    if stored_dtype(cache_dtype) is not None:
        return quantized_bytes(model.get_head_size(), cache_dtype)
    number = int(kv_cache_dtype_str_to_dtype(cache_dtype, model).itemsize)
    return 2 * int(model.get_head_size()) * number


def quantized_bytes(head_size: int, cache_dtype: str) -> int:
    """Return the bytes of an entry's keys and values in one head of a quantized cache.

    Scales are included.
    """
    stored = _STORED[cache_dtype]
    numbers = head_size // 2 if stored.dtype == torch.uint8 else head_size
    return 2 * (numbers + torch.float32.itemsize * stored.has_scales)
