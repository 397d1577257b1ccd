"""vLLM's plug-in entry point: registers the compressed cache. No effect where that is off."""

from typing import Any


def register() -> None:
    """Register cache and backends. vLLM calls this in each process, maybe more than once."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from adakv_worker.core.manager import AdaKVManager
    from adakv_worker.spec import AdaKVSpec

    # vLLM fills its registry on first use, but only while it is empty.
    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(AdaKVSpec, AdaKVManager, uniform_type_base_spec=FullAttentionSpec)
    backends = {}
    if current_platform.is_cpu():
        backends = {AttentionBackendEnum.CPU_ATTN: "cpu.AdaKVCPUBackend"}
    elif current_platform.is_cuda():
        backends = {
            AttentionBackendEnum.FLASH_ATTN: "gpu.AdaKVFlashBackend",
            AttentionBackendEnum.TRITON_ATTN: "gpu.AdaKVTritonBackend",
        }
    for backend, name in backends.items():
        register_backend(backend, f"adakv_worker.attention.{name}")


def engine_args(config: dict[str, Any], *, asynchronous: bool | None = None) -> dict[str, Any]:
    """Return the engine arguments that turn compression on with these settings.

    Args:
        asynchronous: whether to schedule steps before the last one's outputs arrive; None: on CUDA.
            CPUs never do.
    """
    from vllm.platforms import current_platform

    scheduler, worker, settings = "AdaKVScheduler", "cpu_worker.AdaKVCPUWorker", {}
    if current_platform.is_cuda():
        worker = "gpu_worker.AdaKVGPUWorker"
        settings = {"async_scheduling": asynchronous is not False}
        if asynchronous is not False:
            scheduler = "AdaKVAsyncScheduler"
    return {
        "scheduler_cls": f"adakv_worker.scheduler.{scheduler}",
        "worker_cls": f"adakv_worker.{worker}",
        "additional_config": {"adakv": config},
        **settings,
    }
