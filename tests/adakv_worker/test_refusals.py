"""Settings that cannot work with compression are refused at start-up, by their names."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.engine.arg_utils import EngineArgs

from adakv_worker.config import CompressionConfig
from adakv_worker.plugin import engine_args
from adakv_worker.refusals import (
    REFUSED,
    REFUSED_ON_CPU,
    REFUSED_ON_CUDA,
    refuse_unsupported,
    refuse_unsupported_policy,
    refused_here,
    require_classes,
)
from tests.adakv_worker.engines import make_tiny_model

WRITE = "vllm::unified_kv_cache_update"


@pytest.fixture(scope="module")
def supported(tmp_path_factory: pytest.TempPathFactory) -> VllmConfig:
    model = make_tiny_model(tmp_path_factory.mktemp("model"), heads=2, kv_heads=1, layers=1)
    args = EngineArgs(str(model), skip_tokenizer_init=True, **engine_args({}))
    return args.create_engine_config()


@pytest.fixture
def config(supported: VllmConfig) -> VllmConfig:
    return copy.deepcopy(supported)


def _is_of_kind(config: VllmConfig, **kind: bool) -> None:
    model: Any = config.model_config
    model._model_info = replace(model._model_info, **kind)


def _graphs(config: VllmConfig) -> None:
    config.compilation_config.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    config.compilation_config.splitting_ops = ["vllm::unified_attention_with_output"]


def _set_cache(config: VllmConfig, dtype: Any) -> None:
    config.cache_config.cache_dtype = dtype


def _set_pages(config: VllmConfig, dtype: str, block_size: int = 32) -> None:
    config.additional_config = {"adakv": {"page_dtype": dtype}}
    config.cache_config.block_size = block_size


# How to ask for what is refused, by the start of its name in the error.
ASKED: dict[str, Callable[[Any], Any]] = {
    "scheduler_reserve_full_isl: false": (
        lambda c: setattr(c.scheduler_config, "scheduler_reserve_full_isl", False)
    ),
    "speculative_config": lambda c: setattr(c, "speculative_config", object()),
    "pipeline_parallel_size": lambda c: setattr(c.parallel_config, "pipeline_parallel_size", 2),
    "decode_context_parallel_size": (
        lambda c: setattr(c.parallel_config, "decode_context_parallel_size", 2)
    ),
    "prefill_context_parallel_size": (
        lambda c: setattr(c.parallel_config, "prefill_context_parallel_size", 2)
    ),
    "kv_transfer_config": lambda c: setattr(c, "kv_transfer_config", object()),
    "a quantized kv_cache_dtype other than": lambda c: _set_cache(c, "nvfp4"),
    "a page_dtype beside a quantized kv_cache_dtype": (
        lambda c: (_set_pages(c, "fp8"), _set_cache(c, "fp8_e5m2"))
    ),
    "kv_cache_dtype_skip_layers": (
        lambda c: setattr(c.cache_config, "kv_cache_dtype_skip_layers", ["0"])
    ),
    "kv_sharing_fast_prefill": (lambda c: setattr(c.cache_config, "kv_sharing_fast_prefill", True)),
    "a model with multi-head latent attention": (
        lambda c: setattr(c.model_config.model_arch_config, "is_deepseek_mla", True)
    ),
    "a model with sliding-window attention": (
        lambda c: setattr(c.model_config.hf_text_config, "sliding_window", 64)
    ),
    "a hybrid or": lambda c: _is_of_kind(c, is_hybrid=True),
    "a hybrid or attention-free": lambda c: _is_of_kind(c, is_attention_free=True),
    "an encoder-decoder model": (lambda c: setattr(c.model_config, "is_encoder_decoder", True)),
    "enable_dbo": lambda c: setattr(c.parallel_config, "enable_dbo", True),
    "CUDA graphs that write to the KV cache": _graphs,
    "prefix_match_unit": (
        lambda c: setattr(c.cache_config, "prefix_match_unit", c.cache_config.block_size // 2)
    ),
}


@pytest.mark.parametrize("setting", ASKED)
def test_what_cannot_be_compressed_is_refused_by_its_name(
    config: VllmConfig, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    refuse_unsupported(config)
    ASKED[setting](config)
    with pytest.raises(ValueError, match=f"adakv: compression does not work with {setting}"):
        refuse_unsupported(config)


# Its own test asks for it.
FP8_ON_CPU = "kv_cache_dtype or page_dtype fp8 on a CPU without AVX-512 or AMX"
SCALES = "a scale for each entry"
ASKED_ON_CPU: dict[str, Callable[[Any], Any]] = {
    SCALES: lambda c: _set_cache(c, "int8_per_token_head"),
    f"{SCALES} (.*) on a CPU": lambda c: _set_pages(c, "int4"),
    "page_dtype on a CPU with a block_size or head size": (
        lambda c: _set_pages(c, "fp8", block_size=48)
    ),
}
ASKED_ON_CUDA: dict[str, Callable[[Any], Any]] = {
    "kv_cache_dtype or page_dtype fp8_e5m2": lambda c: _set_cache(c, "fp8_e5m2"),
    "kv_cache_dtype or page_dtype fp8_e5m2 on CUDA": lambda c: _set_pages(c, "fp8_e5m2"),
    "page_dtype fp8 on a GPU before compute capability 8.9": lambda c: _set_pages(c, "fp8"),
    SCALES: lambda c: (_set_cache(c, "int8_per_token_head"), _set_head_size(c, 36)),
    f"{SCALES} (.*) with a head size": lambda c: (_set_pages(c, "int4"), _set_head_size(c, 36)),
    "page_dtype on CUDA with a head size below 32": (
        lambda c: (_set_pages(c, "int8"), _set_head_size(c, 16))
    ),
}


def _set_head_size(config: VllmConfig, size: int) -> None:
    config.model_config.model_arch_config.head_size = size


@pytest.mark.parametrize("setting", ASKED_ON_CPU)
def test_what_cpus_cannot_attend_to_is_refused_by_its_name(
    config: VllmConfig, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    assert refused_here() is REFUSED_ON_CPU
    refuse_unsupported(config, REFUSED_ON_CPU)
    ASKED_ON_CPU[setting](config)
    refuse_unsupported(config)
    with pytest.raises(ValueError, match=f"adakv: compression does not work with {setting}"):
        refuse_unsupported(config, REFUSED_ON_CPU)


@pytest.mark.parametrize("setting", ASKED_ON_CUDA)
def test_what_gpus_cannot_attend_to_is_refused_by_its_name(
    config: VllmConfig, setting: str
) -> None:
    refuse_unsupported(config, REFUSED_ON_CUDA)
    ASKED_ON_CUDA[setting](config)
    with pytest.raises(ValueError, match=f"adakv: compression does not work with {setting}"):
        refuse_unsupported(config, REFUSED_ON_CUDA)


@pytest.mark.parametrize(
    "ask",
    [
        lambda c: _set_cache(c, "fp8"),
        lambda c: _set_cache(c, "int8_per_token_head"),
        lambda c: _set_cache(c, "int4_per_token_head"),
        lambda c: _set_pages(c, "int8", block_size=16),
        lambda c: _set_pages(c, "int4", block_size=16),
    ],
)
def test_fewer_bits_are_allowed_on_cuda(config: VllmConfig, ask: Callable[[Any], Any]) -> None:
    ask(config)
    refuse_unsupported(config)
    refuse_unsupported(config, REFUSED_ON_CUDA)


def test_every_refusal_has_a_row() -> None:
    asked = (*ASKED, *ASKED_ON_CPU, *ASKED_ON_CUDA, FP8_ON_CPU)
    refused = (*REFUSED, *REFUSED_ON_CPU, *REFUSED_ON_CUDA)
    assert [name for name in refused if not name.startswith(asked)] == []


def _lose_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)


@pytest.mark.parametrize("dtype", ["fp8", "fp8_e4m3", "fp8_e5m2"])
def test_eight_bits_need_a_cpu_with_kernels_for_them(
    config: VllmConfig, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    config.cache_config.cache_dtype = dtype
    refuse_unsupported(config, REFUSED_ON_CPU)
    _lose_kernels(monkeypatch)
    with pytest.raises(ValueError, match=f"does not work with {FP8_ON_CPU}"):
        refuse_unsupported(config, REFUSED_ON_CPU)


def test_pages_of_eight_bits_need_a_cpu_with_kernels_for_them(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_supported", lambda: True)
    _set_pages(config, "fp8")
    refuse_unsupported(config, REFUSED_ON_CPU)
    # The same numbers by another name are no other pages.
    config.cache_config.cache_dtype = "fp8_e4m3"
    refuse_unsupported(config, REFUSED_ON_CPU)
    config.cache_config.cache_dtype = "auto"
    _lose_kernels(monkeypatch)
    with pytest.raises(ValueError, match=f"does not work with {FP8_ON_CPU}"):
        refuse_unsupported(config, REFUSED_ON_CPU)


def test_units_of_whole_blocks_are_allowed(config: VllmConfig) -> None:
    config.cache_config.prefix_match_unit = config.cache_config.block_size
    refuse_unsupported(config)


def test_no_graph_may_hold_what_writes_to_the_cache(
    config: VllmConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    _graphs(config)
    compilation = config.compilation_config
    assert compilation.splitting_ops is not None
    compilation.splitting_ops.append(WRITE)
    refuse_unsupported(config)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match="VLLM_USE_BREAKABLE_CUDAGRAPH"):
        refuse_unsupported(config)
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    refuse_unsupported(config)


@pytest.mark.parametrize(
    ("part", "setting", "stock"),
    [
        ("scheduler_config", "scheduler_cls", "vllm.v1.core.sched.scheduler.Scheduler"),
        ("parallel_config", "worker_cls", "vllm.v1.worker.cpu_worker.CPUWorker"),
    ],
)
def test_compression_is_never_configured_without_the_classes_that_compress(
    config: VllmConfig, part: str, setting: str, stock: str
) -> None:
    require_classes(config)
    setattr(getattr(config, part), setting, stock)
    with pytest.raises(ValueError, match=f"turns compression on, but {setting} is not one of"):
        require_classes(config)


def test_steps_ahead_need_the_scheduler_for_them(config: VllmConfig) -> None:
    config.scheduler_config.async_scheduling = True
    with pytest.raises(ValueError, match=r"async_scheduling needs .*AdaKVAsyncScheduler"):
        require_classes(config)
    config.scheduler_config.scheduler_cls = "adakv_worker.scheduler.AdaKVAsyncScheduler"
    require_classes(config)


def test_a_policy_that_cannot_score_the_model_is_refused_with_those_that_can() -> None:
    unsupported = {"ada_snapkv": "its layers have no rotary embedding"}
    with pytest.raises(ValueError, match="policy 'ada_snapkv' does not work") as refused:
        refuse_unsupported_policy(CompressionConfig(policy="ada_snapkv"), unsupported)
    message = str(refused.value)
    assert "no rotary embedding" in message
    known = message.partition("these do: ")[2].split(", ")
    assert "streaming_llm" in known
    assert "ada_snapkv" not in known
    for policy in ("auto", "full", "streaming_llm"):
        refuse_unsupported_policy(CompressionConfig(policy=policy), unsupported)
