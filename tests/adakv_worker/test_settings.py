"""What the GPU's settings must be, where vLLM itself would set them."""

from pathlib import Path

import pytest
from vllm.config import CUDAGraphMode
from vllm.engine.arg_utils import AsyncEngineArgs

from adakv_worker.plugin import engine_args
from adakv_worker.refusals import refuse_unsupported, require_classes
from tests.adakv_worker.engines import make_tiny_model


def test_steps_ahead_need_the_scheduler_for_them(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, heads=2, kv_heads=1, layers=1)
    args = AsyncEngineArgs(str(model), skip_tokenizer_init=True, **engine_args({}))
    config = args.create_engine_config()
    require_classes(config)
    config.scheduler_config.async_scheduling = True
    with pytest.raises(ValueError, match=r"async_scheduling needs .*AdaKVAsyncScheduler"):
        require_classes(config)
    config.scheduler_config.scheduler_cls = "adakv_worker.scheduler.AdaKVAsyncScheduler"
    require_classes(config)


def test_no_graph_may_hold_what_writes_to_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_tiny_model(tmp_path, heads=2, kv_heads=1, layers=1)
    args = AsyncEngineArgs(str(model), skip_tokenizer_init=True, **engine_args({}))
    config = args.create_engine_config()
    compilation = config.compilation_config
    compilation.cudagraph_mode = CUDAGraphMode.FULL_AND_PIECEWISE
    compilation.splitting_ops = ["vllm::unified_attention_with_output"]
    with pytest.raises(ValueError, match="CUDA graphs that write to the KV cache"):
        refuse_unsupported(config)
    compilation.splitting_ops.append("vllm::unified_kv_cache_update")
    refuse_unsupported(config)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    with pytest.raises(ValueError, match="VLLM_USE_BREAKABLE_CUDAGRAPH"):
        refuse_unsupported(config)
    compilation.cudagraph_mode = CUDAGraphMode.FULL_DECODE_ONLY
    refuse_unsupported(config)
