"""Tensor parallelism on the GPU's path: two ranks answer as one, each with heads of its own."""

from pathlib import Path
from typing import Any

import pytest

from adakv_worker.plugin import engine_args
from tests.adakv_worker.engines import make_tiny_model, prompt
from tests.adakv_worker.gpu import interpreted

# With uniform heads two ranks keep the same entries as one.
COMPRESSION = {
    "policy": "snapkv", "budget_tokens": 40, "keep_ratio": 0.0, "window_tokens": 8,
    "min_budget_tokens": 1, "check_invariants": True,
    # Too little for a cache: each comes back from the host.
    "sessions": {"enabled": True, "min_saved_tokens": 1, "share": 0.002, "host_bytes": 64 << 20},
}  # fmt: skip
EVICTING = {"adakv_decode_budget_tokens": 40, "adakv_decode_interval_tokens": 32}


@pytest.fixture(autouse=True)
def _processes(monkeypatch: pytest.MonkeyPatch) -> None:
    here = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{here / 'startup'}:{here.parents[2]}")
    monkeypatch.setenv(interpreted.GRAPHS, "1")
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")


def answers(model: Path, ranks: int) -> list[dict[str, Any]]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        str(model), dtype="float32", max_model_len=512, block_size=16, enforce_eager=True,
        kv_cache_memory_bytes=8 << 20, max_num_batched_tokens=64, max_num_seqs=8,
        skip_tokenizer_init=True, disable_log_stats=True, async_scheduling=False,
        distributed_executor_backend="mp", tensor_parallel_size=ranks, **engine_args(COMPRESSION),
    )  # fmt: skip
    prompts = [{"prompt_token_ids": prompt(length, seed=length)} for length in (90, 120, 20)]
    plain = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, detokenize=False)
    bounded = SamplingParams(
        temperature=0, max_tokens=40, ignore_eos=True, detokenize=False, extra_args=EVICTING
    )

    def ask(asked: list[Any], params: list[Any]) -> list[dict[str, Any]]:
        outputs = llm.generate(asked, params, use_tqdm=False)
        return [
            {
                "tokens": list(output.outputs[0].token_ids),
                "proof": (output.kv_transfer_params or {})["kv_compression"],
            }
            for output in outputs
        ]

    try:
        first = ask(prompts, [plain, bounded, plain])
        # The next turns of the first two.
        on = [
            {"prompt_token_ids": [*asked["prompt_token_ids"], *said["tokens"], *prompt(30, seed=5)]}
            for asked, said in zip(prompts[:2], first[:2], strict=True)
        ]
        return first + ask(on, [plain, bounded])
    finally:
        llm.llm_engine.engine_core.shutdown()


@pytest.mark.slow
def test_two_ranks_answer_as_one(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path, heads=4, kv_heads=2, layers=2)
    one = answers(model, 1)
    assert answers(model, 2) == one
    assert [answer["proof"]["skipped"] for answer in one[:3]] == [None, None, "within_budget"]
    sessions = [answer["proof"]["session"] for answer in one[3:]]
    assert [session["resumed_tokens"] for session in sessions] == [99, 159]
    assert "host" in {session["source"] for session in sessions}
    assert one[1]["proof"]["decode_evictions"] == 1
