"""What cannot work with compressed caches is refused at start-up, by the name of its setting."""

from collections.abc import Mapping
from typing import Any

from vllm import envs
from vllm.config import VllmConfig
from vllm.utils.import_utils import resolve_obj_by_qualname
from vllm.utils.torch_utils import is_quantized_kv_cache
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from adakv_worker.config import CompressionConfig
from kernels.policies.presets import PRESETS


def refuse_unsupported(config: VllmConfig) -> None:
    """Raises ValueError that names the first setting which compression cannot honour."""
    parallel, cache = config.parallel_config, config.cache_config
    model = config.model_config
    refusals = {
        "speculative_config (one token a step)": config.speculative_config is not None,
        "pipeline_parallel_size > 1 (pages are shared by all layers)": (
            parallel.pipeline_parallel_size > 1
        ),
        "decode_context_parallel_size > 1": parallel.decode_context_parallel_size > 1,
        "prefill_context_parallel_size > 1": parallel.prefill_context_parallel_size > 1,
        "kv_transfer_config (KV connectors)": config.kv_transfer_config is not None,
        "kv_cache_dtype (a quantized cache cannot be scored yet)": is_quantized_kv_cache(
            cache.cache_dtype
        ),
        "kv_sharing_fast_prefill": cache.kv_sharing_fast_prefill,
        "a model with multi-head latent attention": model.use_mla,
        "a model with sliding-window attention": model.get_sliding_window() is not None,
        "a hybrid or attention-free model": model.is_hybrid or model.is_attention_free,
        "an encoder-decoder model": model.is_encoder_decoder,
        "enable_dbo (micro-batches)": parallel.enable_dbo,
        "CUDA graphs that write to the KV cache (VLLM_USE_BREAKABLE_CUDAGRAPH, which "
        "VLLM_BATCH_INVARIANT may turn on; splitting_ops; use_inductor_graph_partition)": (
            _graphs_hold_cache_writes(config)
        ),
    }
    for setting, present in refusals.items():
        if present:
            raise ValueError(f"adakv: compression does not work with {setting}")
    hash_unit = getattr(cache, "prefix_match_unit", None)
    if hash_unit is not None and hash_unit != cache.block_size:
        raise ValueError(
            "adakv: compression does not work with prefix_match_unit other than block_size"
        )


def _graphs_hold_cache_writes(config: VllmConfig) -> bool:
    """Whether piecewise graphs would go on writing where a request lay before it was compressed."""
    compilation = config.compilation_config
    mode = compilation.cudagraph_mode
    if mode is None or not mode.has_piecewise_cudagraphs():
        return False
    left_out = (
        compilation.splitting_ops_contain_kv_cache_update()
        # vLLM asks for that of multi-head latent attention as well.
        or "vllm::unified_kv_cache_update" in (compilation.splitting_ops or ())
    )
    return envs.VLLM_USE_BREAKABLE_CUDAGRAPH or not left_out


def refuse_unsupported_policy(config: CompressionConfig, unsupported: Mapping[str, str]) -> None:
    """Raise ValueError if the configured policy does not work with the model.

    Args:
        unsupported: presets that do not, with the reason.
    """
    # `auto` takes one that does.
    if (reason := unsupported.get(config.policy)) is not None:
        known = ", ".join(sorted(PRESETS.keys() - unsupported.keys()))
        raise ValueError(
            f"adakv: policy '{config.policy}' does not work with this model ({reason}): "
            f"these do: {known}, auto, full"
        )


def require_classes(config: VllmConfig) -> None:
    """Raises ValueError if the settings are there but the classes that act on them are not.

    Configured and yet not run would be the worst of all outcomes.
    """
    scheduler = config.scheduler_config
    for setting, cls in (
        ("scheduler_cls", _resolved(scheduler.scheduler_cls)),
        ("worker_cls", _resolved(config.parallel_config.worker_cls)),
    ):
        names = {base.__module__.partition(".")[0] for base in getattr(cls, "__mro__", ())}
        if "adakv_worker" not in names:
            raise ValueError(
                f"adakv: additional_config turns compression on, but {setting} is not one of "
                "adakv_worker's (see docs/compression.md)"
            )
    if scheduler.async_scheduling and not issubclass(
        _resolved(scheduler.scheduler_cls), AsyncScheduler
    ):
        raise ValueError(
            "adakv: async_scheduling needs scheduler_cls adakv_worker.scheduler.AdaKVAsyncScheduler"
        )


def _resolved(cls: Any) -> Any:
    return resolve_obj_by_qualname(cls) if isinstance(cls, str) else cls
