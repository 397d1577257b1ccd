"""A pytest plugin for machines without a GPU: vLLM's CPU engine takes the GPU's path.

Backends, page layout, page tables and kernels are the GPU's, in Triton's interpreter. It does not
include streams and graphs; `flash_attention` stands in for FlashAttention's kernels. Load it before
anything imports vLLM.
"""

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

_ENVIRONMENT = {
    "TRITON_INTERPRET": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


# Environment variable that gives worker processes graphs.
GRAPHS = "ADAKV_TEST_GRAPHS"
# Captures and replays the next engine's steps, if set: see `graphs.py`.
graphs: Any = None


def pytest_load_initial_conftests() -> None:
    take_the_gpus_path()


def take_the_gpus_path() -> None:
    os.environ.update(_ENVIRONMENT)
    from triton.backends import backends

    # vLLM for CPUs uses Triton only if it has a backend for them.
    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: False))  # type: ignore[assignment]
    torch.cuda.get_device_capability = lambda *_: (9, 0)  # type: ignore[assignment]
    from vllm.v1.attention.backends import flash_attn, triton_attn

    # Small batches of long sequences are split, which is slow here: split batches of two only.
    triton_attn.MIN_LAUNCH_GRID_SIZE_2D = 2
    flash_attn.get_flash_attn_version = lambda *_, **__: 3  # type: ignore[assignment]
    flash_attn.flash_attn_supports_kv_cache_dtype = lambda *_, **__: True  # type: ignore[assignment]
    flash_attn.flash_attn_varlen_func = flash_attention  # type: ignore[assignment]
    flash_attn.reshape_and_cache_flash = store  # type: ignore[attr-defined]
    flash_attn.get_scheduler_metadata = lambda **_: torch.zeros(1, dtype=torch.int32)  # type: ignore[attr-defined]
    _take_the_gpus_rounding()
    _take_the_gpus_kernels()
    _take_the_gpus_worker()
    _take_the_gpus_settings()


def _take_the_gpus_rounding() -> None:
    """Mend the interpreter's conversion to eight bits: it makes 1.98 one instead of two."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def converted(numbers: Any, before: Any, after: Any, rounding: Any) -> Any:
        if after != tl.float8e4nv or before != tl.float32:
            return convert(numbers, before, after, rounding)
        nearest = torch.from_numpy(numbers.copy()).clamp(-448, 448).to(torch.float8_e4m3fn)
        return nearest.view(torch.uint8).numpy()

    interpreter._convert_float = converted


def _take_the_gpus_kernels() -> None:
    import adakv_worker.worker.gpu  # noqa: F401
    from adakv_serve.kernels.paging.paged_cache import compact, compact_in_place
    from adakv_serve.kernels.policies.attention import reduced_window_attention
    from adakv_serve.kernels.policies.top import top_mask

    for operation in (reduced_window_attention, compact, compact_in_place, top_mask):
        paths: dict[str, Any] = operation._paths
        paths["cpu"] = paths["cuda"]


def _take_the_gpus_worker() -> None:
    from vllm.v1.worker.cpu.model_runner import CPUModelRunner as CPUModelRunnerV2
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    from adakv_worker.attention import cpu as cpu_backend
    from adakv_worker.attention.gpu import AdaKVFlashBackend
    from adakv_worker.worker import cpu as cpu_worker
    from adakv_worker.worker.gpu import BlocksOutermost
    from adakv_worker.worker.runner_v1 import AdaKVRunnerV1
    from adakv_worker.worker.runner_v2 import AdaKVRunnerV2

    class WithGraphs(BlocksOutermost):
        def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
            from tests.adakv_worker.gpu.graphs import Graphs

            emulated = Graphs(pytest.MonkeyPatch()) if GRAPHS in os.environ else graphs
            if emulated is not None:
                emulated.enable(self)
            super().initialize_kv_cache(*args, **kwargs)
            if emulated is not None:
                emulated.capture(self)

    class Runner(WithGraphs, AdaKVRunnerV1, CPUModelRunner):
        """The CPU's Model Runner V1 with the GPU's pages."""

    class RunnerV2(WithGraphs, AdaKVRunnerV2, CPUModelRunnerV2):
        """The CPU's Model Runner V2 with the GPU's pages."""

    cpu_backend.AdaKVCPUBackend = AdaKVFlashBackend  # type: ignore[misc, assignment]
    cpu_worker.AdaKVCPUModelRunner = Runner  # type: ignore[misc, assignment]
    cpu_worker.AdaKVCPUModelRunnerV2 = RunnerV2  # type: ignore[misc, assignment]


def _take_the_gpus_settings() -> None:
    from vllm.config import VllmConfig
    from vllm.platforms.cpu import CpuPlatform

    update = CpuPlatform.check_and_update_config

    def checked(config: VllmConfig) -> None:
        update(config)
        scheduler = config.scheduler_config
        scheduler.async_scheduling = "Async" in str(scheduler.scheduler_cls)

    CpuPlatform.check_and_update_config = staticmethod(checked)  # type: ignore[assignment, method-assign]
    CpuPlatform.has_device_capability = classmethod(lambda *_, **__: True)  # type: ignore[assignment]


def store(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slots: Tensor, *_: Any
) -> None:
    """Do what vLLM's `reshape_and_cache_flash` does with caches [pages, page_tokens, H, D]."""
    page_tokens = key_cache.shape[1]
    for entry, slot in enumerate(slots.tolist()):
        if slot >= 0:
            key_cache[slot // page_tokens, slot % page_tokens] = key[entry]
            value_cache[slot // page_tokens, slot % page_tokens] = value[entry]


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    seqused_k: Tensor,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    block_table: Tensor,
    **_: Any,
) -> Tensor:
    """Do what `flash_attn_varlen_func` does with paged caches [pages, page_tokens, H, D]."""
    assert causal
    assert int(seqused_k.max()) <= max_seqlen_k
    starts, page_tokens, group = cu_seqlens_q.tolist(), k.shape[1], q.shape[1] // k.shape[2]
    assert block_table.shape[1] * page_tokens >= int(seqused_k.max())
    for index, length in enumerate(seqused_k.tolist()):
        query = q[starts[index] : starts[index + 1]]
        assert len(query) <= max_seqlen_q
        pages = block_table[index, : -(-length // page_tokens)].long()
        keys, values = (
            cache[pages].flatten(0, 1)[:length].repeat_interleave(group, dim=1) for cache in (k, v)
        )
        logits = torch.einsum("qhd,khd->hqk", query, keys) * softmax_scale
        places = torch.arange(length) <= torch.arange(length - len(query), length)[:, None]
        weights = logits.masked_fill(~places, float("-inf")).softmax(dim=-1)
        out[starts[index] : starts[index + 1]] = torch.einsum("hqk,khd->qhd", weights, values)
    return out
