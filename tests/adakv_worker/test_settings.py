"""What the GPU's settings must be, where vLLM itself would set them."""

from pathlib import Path

import pytest
from vllm.engine.arg_utils import AsyncEngineArgs

from adakv_worker.plugin import engine_args
from adakv_worker.support import require_classes
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
