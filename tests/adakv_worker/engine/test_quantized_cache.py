"""Engines whose KV cache stores eight bits: what they keep, move and answer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adakv_serve.kernels.policies.presets import PRESETS
from tests.adakv_worker.eight_bits import (
    FORMATS,
    assert_near_reference,
    attention_to,
    towards_zero,
)
from tests.adakv_worker.engine.test_eviction import BOUND, Traced
from tests.adakv_worker.engine.test_eviction import run as run_traced
from tests.adakv_worker.engine.test_moves import go_on, leave, run
from tests.adakv_worker.engines import Engine, Reference, prompt

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 kernels for CPUs need AVX-512"
)

COMPRESSION = {
    "budget_tokens": 48, "keep_ratio": 0.0, "window_tokens": 16, "max_budget_tokens": 100_000,
}  # fmt: skip


@pytest.fixture(scope="module", params=FORMATS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(in_process: None, gqa_model: Path, form: str) -> Iterator[Engine]:
    engine = Engine(gqa_model, COMPRESSION, kv_cache_dtype=form)
    yield engine
    engine.assert_nothing_leaked()
    engine.close()


@pytest.fixture(scope="module")
def reference(gqa_model: Path, form: str) -> Reference:
    return Reference(gqa_model, attention_to(FORMATS[form], towards_zero))


def test_a_block_takes_a_quarter_of_the_bytes(engine: Engine) -> None:
    pool = engine.scheduler.kv_cache_manager.block_pool
    assert pool.num_gpu_blocks == (64 << 20) // (2 * 4 * 2 * 32 * 32)


@pytest.mark.parametrize("policy", PRESETS)
def test_every_preset_answers_as_the_reference(
    engine: Engine, reference: Reference, policy: str
) -> None:
    options = {"adakv_policy": policy, "adakv_budget_tokens": 48}
    results = engine.run(
        [prompt(length, seed=length) for length in (200, 333, 700)],
        engine.params(max_tokens=24, extra_args=options),
    )
    for result in results:
        assert result.proof is not None
        assert (result.proof["policy"], result.proof["kept_mean"]) == (policy, 48)
        assert_near_reference(result, reference)


def test_a_cache_found_by_its_prefix_is_compressed_alike(engine: Engine) -> None:
    ids, params = prompt(600, seed=5), engine.params(max_tokens=24)
    (first,) = engine.run([ids], params)
    (second,) = engine.run([ids], params)
    assert second.tokens == first.tokens
    assert second.kept is not None
    assert first.kept is not None
    assert torch.equal(second.kept, first.kept)


def test_every_step_of_a_bounded_request_attends_to_the_kept_entries(
    engine: Engine, reference: Reference
) -> None:
    params = engine.params(max_tokens=100, extra_args={**BOUND, "adakv_budget_tokens": 48})
    requests = {
        f"{length}": Traced(engine, f"{length}", prompt(length, seed=length), params)
        for length in (40, 300)
    }
    run_traced(engine, requests)
    for traced in requests.values():
        assert traced.result is not None
        assert_near_reference(traced.result, reference, traced.kept_at)


@pytest.mark.parametrize("after", [12, 33])
def test_a_moved_cache_goes_on_as_if_it_had_stayed(
    engine: Engine, after: int, tmp_path: Path
) -> None:
    ids = prompt(500, seed=42)
    params = engine.params(max_tokens=80, extra_args=BOUND)
    engine.llm.llm_engine.add_request("staying", {"prompt_token_ids": ids}, params)
    staying = run(engine, "staying")
    left = leave(engine, ids, params, after, str(tmp_path / "state"))
    arrived = go_on(engine, left, len(ids), params, staged=True)
    assert [*left.answer.tokens, *arrived.tokens] == staying.tokens
    assert arrived.proof == staying.proof
    engine.flush()
