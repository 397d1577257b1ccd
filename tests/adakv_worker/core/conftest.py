from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from adakv_worker import plugin
from adakv_worker.spec import AdaKVSpec
from tests.adakv_worker.fake_worker import CoreConfig

BLOCK_TOKENS = 32


def _core_config(model: Path, blocks: int, **options: Any) -> CoreConfig:
    """Return the configuration of a core that compresses to 64 entries."""
    compression = {
        "budget_tokens": 64, "keep_ratio": 0.0, "check_invariants": True, "min_budget_tokens": 1,
    }  # fmt: skip
    config = EngineArgs(
        model=str(model), skip_tokenizer_init=True, dtype="float32", block_size=BLOCK_TOKENS,
        max_num_seqs=6, enforce_eager=True, enable_prefix_caching=True, **options,
        **plugin.engine_args(compression),
    ).create_engine_config()  # fmt: skip
    config.cache_config.num_gpu_blocks = blocks
    layer = AdaKVSpec(block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return CoreConfig(config, KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], layer)]))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    plugin.register()
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=4096, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="session")
def small(model: Path) -> CoreConfig:
    """Return the configuration of a core with 48 blocks, little for what the tests ask of it."""
    return _core_config(model, 48, max_model_len=1024, max_num_batched_tokens=512)


@pytest.fixture(scope="session")
def roomy(model: Path) -> CoreConfig:
    """Return the configuration of a core with more blocks than the tests ask for."""
    return _core_config(model, 1000, max_model_len=4096, max_num_batched_tokens=4096)
