"""Refuses at start-up, by the name of a setting, what cannot work with compressed caches."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from vllm import envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from adakv_serve.kernels.policies.presets import PRESETS
from adakv_worker.config import CompressionConfig
from adakv_worker.stored_dtypes import has_scales, is_unreadable, page_cache_dtype, store_alike


def _graphs_hold_cache_writes(config: VllmConfig) -> bool:
    """Return whether piecewise graphs would write to where a request was before compression."""
    compilation = config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or not mode.has_piecewise_cudagraphs():
        return False
    left_out = (
        compilation.splitting_ops_contain_kv_cache_update()
        # vLLM's own check also requires the operation of multi-head latent attention.
        or "vllm::unified_kv_cache_update" in (compilation.splitting_ops or ())
    )
    return envs.VLLM_USE_BREAKABLE_CUDAGRAPH or not left_out


def _matches_partial_blocks(config: VllmConfig) -> bool:
    unit = config.cache_config.prefix_match_unit
    return unit is not None and unit != config.cache_config.block_size


def _lacks_fp8_kernels(config: VllmConfig) -> bool:
    quantized = is_quantized_kv_cache(config.cache_config.cache_dtype) or _has_other_pages(config)
    kernels = torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()
    return quantized and not kernels


def _has_other_pages(config: VllmConfig) -> bool:
    """Return whether pages store numbers otherwise than blocks."""
    return not store_alike(page_cache_dtype(config), config.cache_config.cache_dtype)


def _lacks_fp8_arithmetic(config: VllmConfig) -> bool:
    pages = page_cache_dtype(config)
    return (
        _has_other_pages(config)
        and pages.startswith("fp8")
        and not current_platform.has_device_capability(89)
    )


def _has_odd_sizes(config: VllmConfig) -> bool:
    """Return whether pages of eight bits would have other kernels on a CPU than blocks."""
    sizes = (config.cache_config.block_size, config.model_config.get_head_size())
    return _has_other_pages(config) and any(size % 32 for size in sizes)


def _stores(config: VllmConfig) -> tuple[str, str]:
    """Return how blocks and pages store numbers."""
    return config.cache_config.cache_dtype, page_cache_dtype(config)


def _stores_scales(config: VllmConfig) -> bool:
    return any(map(has_scales, _stores(config)))


# What is refused on all platforms, by its name in the error.
REFUSED: dict[str, Callable[[VllmConfig], bool]] = {
    "scheduler_reserve_full_isl: false (requests start when their slabs have room, too)": (
        lambda c: not c.scheduler_config.scheduler_reserve_full_isl
    ),
    "speculative_config (one token a step)": lambda c: c.speculative_config is not None,
    "pipeline_parallel_size > 1 (pages are shared by all layers)": (
        lambda c: c.parallel_config.pipeline_parallel_size > 1
    ),
    "decode_context_parallel_size > 1": (
        lambda c: c.parallel_config.decode_context_parallel_size > 1
    ),
    "prefill_context_parallel_size > 1": (
        lambda c: c.parallel_config.prefill_context_parallel_size > 1
    ),
    "kv_transfer_config (KV connectors)": lambda c: c.kv_transfer_config is not None,
    "a quantized kv_cache_dtype other than fp8, fp8_e4m3, fp8_e5m2 and those that end in "
    "_per_token_head": lambda c: is_unreadable(c.cache_config.cache_dtype),
    "a page_dtype beside a quantized kv_cache_dtype (each entry would be quantized twice)": (
        lambda c: is_quantized_kv_cache(c.cache_config.cache_dtype) and _has_other_pages(c)
    ),
    "kv_cache_dtype_skip_layers (all layers share their pages)": (
        lambda c: bool(c.cache_config.kv_cache_dtype_skip_layers)
    ),
    "kv_sharing_fast_prefill": lambda c: c.cache_config.kv_sharing_fast_prefill,
    "a model with multi-head latent attention": lambda c: c.model_config.use_mla,
    "a model with sliding-window attention": (
        lambda c: c.model_config.get_sliding_window() is not None
    ),
    "a hybrid or attention-free model": (
        lambda c: c.model_config.is_hybrid or c.model_config.is_attention_free
    ),
    "an encoder-decoder model": lambda c: c.model_config.is_encoder_decoder,
    "enable_dbo (micro-batches)": lambda c: c.parallel_config.enable_dbo,
    "CUDA graphs that write to the KV cache (VLLM_USE_BREAKABLE_CUDAGRAPH, which "
    "VLLM_BATCH_INVARIANT may turn on; splitting_ops; use_inductor_graph_partition)": (
        _graphs_hold_cache_writes
    ),
    "prefix_match_unit other than block_size": _matches_partial_blocks,
}


_SCALES = "a scale for each entry (kv_cache_dtype *_per_token_head, page_dtype int8 or int4)"
REFUSED_ON_CPU: dict[str, Callable[[VllmConfig], bool]] = {
    f"{_SCALES} on a CPU, where vLLM has no kernels for it": _stores_scales,
    "kv_cache_dtype or page_dtype fp8 on a CPU without AVX-512 or AMX": _lacks_fp8_kernels,
    "page_dtype on a CPU with a block_size or head size that 32 does not divide": _has_odd_sizes,
}
REFUSED_ON_CUDA: dict[str, Callable[[VllmConfig], bool]] = {
    "kv_cache_dtype or page_dtype fp8_e5m2 on CUDA (vLLM's Triton kernels store fp8_e4m3 in its "
    "place)": lambda c: "fp8_e5m2" in _stores(c),
    "page_dtype fp8 on a GPU before compute capability 8.9": _lacks_fp8_arithmetic,
    f"{_SCALES} with a head size that 8 does not divide": (
        lambda c: _stores_scales(c) and c.model_config.get_head_size() % 8 != 0
    ),
    "page_dtype on CUDA with a head size below 32": (
        lambda c: _has_other_pages(c) and c.model_config.get_head_size() < 32
    ),
}


def refused_here() -> Mapping[str, Callable[[VllmConfig], bool]]:
    """Return the settings with which this machine's attention kernels do not work."""
    return REFUSED_ON_CPU if current_platform.is_cpu() else REFUSED_ON_CUDA


def refuse_unsupported(
    config: VllmConfig, refused: Mapping[str, Callable[[VllmConfig], bool]] = REFUSED
) -> None:
    """Raise ValueError for the first setting that does not work with compression."""
    for setting, is_set in refused.items():
        if is_set(config):
            raise ValueError(f"adakv: compression does not work with {setting}")


def refuse_unsupported_policy(config: CompressionConfig, unsupported: Mapping[str, str]) -> None:
    """Raise ValueError if the configured policy does not work with the model.

    Args:
        unsupported: presets that do not work, with the reason.
    """
    # `auto` takes one that works.
    if (reason := unsupported.get(config.policy)) is not None:
        known = ", ".join(sorted(PRESETS.keys() - unsupported.keys()))
        raise ValueError(
            f"adakv: policy '{config.policy}' does not work with this model ({reason}): "
            f"these do: {known}, auto, full"
        )


def require_classes(config: VllmConfig) -> None:
    """Raise ValueError if the settings turn compression on but vLLM's classes would run.

    Such an engine would start and compress nothing.
    """
    scheduler = _resolved(config.scheduler_config.scheduler_cls)
    worker = _resolved(config.parallel_config.worker_cls)
    for setting, cls in (("scheduler_cls", scheduler), ("worker_cls", worker)):
        names = {base.__module__.partition(".")[0] for base in getattr(cls, "__mro__", ())}
        if "adakv_worker" not in names:
            raise ValueError(
                f"adakv: additional_config turns compression on, but {setting} is not one of "
                "adakv_worker's (see docs/compression.md)"
            )
    if config.scheduler_config.async_scheduling and not issubclass(scheduler, AsyncScheduler):
        raise ValueError(
            "adakv: async_scheduling needs scheduler_cls adakv_worker.scheduler.AdaKVAsyncScheduler"
        )


def _resolved(cls: Any) -> Any:
    """Return a class that may be given by its dotted name."""
    return resolve_obj_by_qualname(cls) if isinstance(cls, str) else cls
