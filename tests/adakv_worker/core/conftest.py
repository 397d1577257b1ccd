import pytest
import torch
from transformers import LlamaConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec

from adakv_worker import plugin
from adakv_worker.spec import AdaKVSpec
from tests.adakv_worker.fake_worker import CoreConfig

BLOCK_TOKENS, BLOCKS = 32, 48


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> CoreConfig:
    """Return the configuration of a core with 48 blocks, little for what the tests ask of it."""
    plugin.register()
    model = tmp_path_factory.mktemp("llama")
    LlamaConfig(
        hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=1024, architectures=["LlamaForCausalLM"],
    ).save_pretrained(model)  # fmt: skip
    compression = {
        "budget_tokens": 64, "keep_ratio": 0.0, "check_invariants": True, "min_budget_tokens": 1,
    }  # fmt: skip
    config = EngineArgs(
        model=str(model), skip_tokenizer_init=True, dtype="float32", block_size=BLOCK_TOKENS,
        max_model_len=1024, max_num_seqs=6, max_num_batched_tokens=512, enforce_eager=True,
        enable_prefix_caching=True, **plugin.engine_args(compression),
    ).create_engine_config()  # fmt: skip
    config.cache_config.num_gpu_blocks = BLOCKS
    layer = AdaKVSpec(block_size=BLOCK_TOKENS, num_kv_heads=2, head_size=32, dtype=torch.float32)
    return CoreConfig(config, KVCacheConfig(BLOCKS, [], [KVCacheGroupSpec(["layer"], layer)]))
