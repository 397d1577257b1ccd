"""Compression with vLLM's multiprocess executor and tensor parallelism, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from adakv_serve.serving.models.embedded import embedded_model_path
from tests.adakv_worker.engines import make_tiny_model, prompt

RUN = """
import json, sys
from vllm import LLM, SamplingParams
from adakv_worker.plugin import engine_args
if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    compression = settings["compression"]
    llm = LLM(
        dtype="float32", max_model_len=2048, block_size=32,
        enforce_eager=not settings["compiled"], kv_cache_memory_bytes=100 << 20,
        max_num_batched_tokens=512, max_num_seqs=8,
        skip_tokenizer_init=True, distributed_executor_backend="mp",
        model=settings["model"], tensor_parallel_size=settings["ranks"],
        **(engine_args(compression) if compression is not None else {}),
    )
    answers = []
    for way in settings["ways"]:
        params = SamplingParams(
            temperature=0, max_tokens=80 if "adakv_decode_budget_tokens" in way else 40,
            ignore_eos=True, detokenize=False, logprobs=5, extra_args=way or None,
        )
        prompts = [{"prompt_token_ids": ids} for ids in settings["prompts"]]
        for output in llm.generate(prompts, params, use_tqdm=False):
            best = output.outputs[0]
            answers.append({
                "tokens": list(best.token_ids),
                "logprobs": [
                    {token: entry.logprob for token, entry in step.items()}
                    for step in best.logprobs
                ],
                "proof": (output.kv_transfer_params or {}).get("kv_compression"),
            })
    print("ANSWERS " + json.dumps(answers), flush=True)
"""


# The engine's budget, one above the prompts' lengths, and evictions while answers are written.
COMPRESSED: dict[str, int] = {}
WHOLE = {"adakv_budget_tokens": 2000}
EVICTING = {"adakv_decode_budget_tokens": 64, "adakv_decode_interval_tokens": 32}
ALL = (COMPRESSED, WHOLE, EVICTING)
# The answers to two prompts.
Pair = list[dict[str, Any]]


class Answers(NamedTuple):
    compressed: Pair
    whole: Pair
    evicting: Pair


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tp"), heads=8, kv_heads=4)


def _answers(
    model: Path, ranks: int, compression: dict[str, Any] | None, *, compiled: bool = False
) -> Answers:
    return Answers(*_asked(model, ranks, compression, *ALL, compiled=compiled))


def _asked(
    model: Path,
    ranks: int,
    compression: dict[str, Any] | None,
    *ways: dict[str, int],
    compiled: bool = False,
) -> list[Pair]:
    """Return the answers to both prompts in each of these ways."""
    settings = {
        "model": str(model), "ranks": ranks, "compression": compression, "compiled": compiled,
        "prompts": [prompt(300, seed=1), prompt(620, seed=2)], "ways": ways,
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
            answers = json.loads(line.removeprefix("ANSWERS "))
            return [answers[first : first + 2] for first in range(0, len(answers), 2)]
    raise AssertionError(f"no answers:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")


def _proofs(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [answer["proof"] for answer in answers]


def _tokens(answers: list[dict[str, Any]]) -> list[list[int]]:
    return [answer["tokens"] for answer in answers]


def _assert_equal(answers: Pair, others: Pair) -> None:
    assert _tokens(answers) == _tokens(others)
    for ours, theirs in zip(answers, others, strict=True):
        for step, expected in zip(ours["logprobs"], theirs["logprobs"], strict=True):
            assert step == pytest.approx(expected, abs=1e-4)


def test_two_ranks_answer_as_one(model: Path) -> None:
    # With uniform heads two ranks keep the same entries as one.
    compression = {
        "policy": "snapkv", "budget_tokens": 64, "keep_ratio": 0.0, "check_invariants": True,
    }  # fmt: skip
    one = _answers(model, 1, compression)
    two = _answers(model, 2, compression)
    assert _tokens(one.compressed) == _tokens(two.compressed)
    assert _proofs(one.compressed) == _proofs(two.compressed)
    assert [proof["skipped"] for proof in _proofs(one.compressed)] == [None, None]
    assert _tokens(one.evicting) == _tokens(two.evicting)
    assert [proof["decode_evictions"] for proof in _proofs(two.evicting)] == [2, 2]
    assert [proof["skipped"] for proof in _proofs(two.whole)] == ["within_budget"] * 2
    (stock,) = _asked(model, 2, None, WHOLE)
    _assert_equal(two.whole, stock)


@pytest.mark.slow
@pytest.mark.long
def test_the_proof_spans_all_ranks(model: Path) -> None:
    compression = {"policy": "ada_snapkv", "budget_tokens": 64, "keep_ratio": 0.0}
    (answers,) = _asked(model, 2, compression, COMPRESSED)
    for proof in _proofs(answers):
        assert proof["kept_mean"] == 64
        assert proof["kept_min"] < 64 < proof["kept_max"]


@pytest.mark.slow
@pytest.mark.long
def test_three_ranks_of_the_embedded_model() -> None:
    compression = {"policy": "ada_snapkv", "budget_tokens": 96, "keep_ratio": 0.0}
    (answers,) = _asked(embedded_model_path(), 3, compression, COMPRESSED)
    for answer in answers:
        # One KV head for each rank: its layers have nothing to share.
        proof = answer["proof"]
        assert proof["kept_mean"] == proof["kept_min"] == proof["kept_max"] == 96
        assert len(answer["tokens"]) == 40


@pytest.mark.slow
@pytest.mark.long
def test_a_compiled_model_answers_as_an_eager_one(model: Path) -> None:
    compression = {"policy": "ada_snapkv", "budget_tokens": 64, "keep_ratio": 0.0}
    eager = _answers(model, 1, compression)
    compiled = _answers(model, 1, compression, compiled=True)
    assert _proofs(compiled.compressed) == _proofs(eager.compressed)
    assert _tokens(compiled.compressed) == _tokens(eager.compressed)
    assert _tokens(compiled.evicting) == _tokens(eager.evicting)
    _assert_equal(compiled.whole, eager.whole)
