"""Compression with vLLM's multiprocess executor and tensor parallelism, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from serving.embedded_model import embedded_model_path
from tests.adakv_worker.engines import make_tiny_model, prompt

RUN = """
import json, sys
from vllm import LLM, SamplingParams
from adakv_worker.plugin import engine_args
if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    llm = LLM(
        dtype="float32", max_model_len=2048, block_size=32,
        enforce_eager=not settings["compiled"], kv_cache_memory_bytes=100 << 20,
        max_num_batched_tokens=512, max_num_seqs=8,
        skip_tokenizer_init=True, distributed_executor_backend="mp",
        model=settings["model"], tensor_parallel_size=settings["ranks"],
        **engine_args(settings["compression"]),
    )
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": ids} for ids in settings["prompts"]]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    answers = [
        [list(o.outputs[0].token_ids), o.kv_transfer_params["kv_compression"]] for o in outputs
    ]
    print("ANSWERS " + json.dumps(answers), flush=True)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tp"), heads=8, kv_heads=4)


def _answers(
    model: Path, ranks: int, compression: dict[str, Any], *, compiled: bool = False
) -> list[Any]:
    settings = {
        "model": str(model), "ranks": ranks, "compression": compression, "compiled": compiled,
        "prompts": [prompt(300, seed=1), prompt(620, seed=2)],
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(settings)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"},
    )
    for line in done.stdout.splitlines():
        if line.startswith("ANSWERS "):
            return json.loads(line.removeprefix("ANSWERS "))
    raise AssertionError(f"no answers:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def test_two_ranks_answer_as_one(model: Path) -> None:
    # With uniform heads a rank chooses for its heads what one rank would choose for them.
    compression = {
        "policy": "snapkv", "budget_tokens": 64, "keep_ratio": 0.0, "check_invariants": True,
    }  # fmt: skip
    one = _answers(model, 1, compression)
    two = _answers(model, 2, compression)
    assert one == two
    assert [proof["skipped"] for _, proof in one] == [None, None]


def test_the_proof_spans_all_ranks(model: Path) -> None:
    compression = {"policy": "ada_snapkv", "budget_tokens": 64, "keep_ratio": 0.0}
    for _, proof in _answers(model, 2, compression):
        assert proof["kept_mean"] == 64
        assert proof["kept_min"] < 64 < proof["kept_max"]


def test_three_ranks_of_the_embedded_model() -> None:
    compression = {"policy": "ada_snapkv", "budget_tokens": 96, "keep_ratio": 0.0}
    for tokens, proof in _answers(embedded_model_path(), 3, compression):
        # One KV head for each rank: its layers have nothing to share.
        assert proof["kept_mean"] == proof["kept_min"] == proof["kept_max"] == 96
        assert len(tokens) == 40


def test_a_compiled_model_answers_as_an_eager_one(model: Path) -> None:
    compression = {"policy": "ada_snapkv", "budget_tokens": 64, "keep_ratio": 0.0}
    eager = _answers(model, 1, compression)
    compiled = _answers(model, 1, compression, compiled=True)
    assert [proof for _, proof in compiled] == [proof for _, proof in eager]
    assert [tokens for tokens, _ in compiled] == [tokens for tokens, _ in eager]
