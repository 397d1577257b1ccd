"""vLLM's entry point: tells it about the compressed cache. Changes nothing where that is off."""

from typing import Any


def register() -> None:
    """Runs in every vLLM process, possibly more than once."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from adakv_worker.manager import AdaKVManager, AdaKVSpec

    # vLLM fills its registry on first use, but only while it is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(AdaKVSpec, AdaKVManager, uniform_type_base_spec=FullAttentionSpec)
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, "adakv_worker.cpu_backend.AdaKVCPUBackend")


def engine_args(config: dict[str, Any], *, asynchronous: bool = False) -> dict[str, Any]:
    """The engine arguments that turn compression on with these settings."""
    scheduler = "AdaKVAsyncScheduler" if asynchronous else "AdaKVScheduler"
    return {
        "scheduler_cls": f"adakv_worker.scheduler.{scheduler}",
        "worker_cls": "adakv_worker.worker.AdaKVCPUWorker",
        "additional_config": {"adakv": config},
    }
