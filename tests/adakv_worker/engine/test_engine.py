"""vLLM's features around compressed requests, on a real engine."""

import os
from typing import Any

import pytest
import torch

from tests.adakv_worker.engines import (
    Engine,
    Reference,
    assert_equals_reference,
    prompt,
)


def _answers_right(result: Any, reference: Reference) -> None:
    assert result.kept is not None
    assert_equals_reference(result, reference, 1e-3)


def test_freed_blocks_are_what_the_proof_says(engine: Engine) -> None:
    before = engine.free_blocks
    request = {"prompt_token_ids": prompt(640, seed=5)}
    engine.llm.llm_engine.add_request("one", request, engine.params(max_tokens=8))
    proof = None
    while proof is None:
        for output in engine.llm.llm_engine.step():
            proof = (output.kv_transfer_params or {}).get("kv_compression")
    # The next step frees the blocks, and may take one for a page.
    engine.llm.llm_engine.step()
    held = before - engine.free_blocks
    assert proof["blocks_before"] == 20
    assert proof["blocks_after"] == 3
    assert proof["blocks_after"] <= held <= proof["blocks_after"] + 1
    while engine.llm.llm_engine.has_unfinished_requests():
        engine.llm.llm_engine.step()
    engine.flush()
    assert engine.free_blocks == before


def test_a_prefix_hit_selects_what_a_miss_selects(engine: Engine, reference: Reference) -> None:
    ids = prompt(500, seed=6)
    (miss,) = engine.run([ids])
    (hit,) = engine.run([ids])
    assert hit.tokens == miss.tokens
    assert torch.equal(hit.kept, miss.kept)
    _answers_right(hit, reference)


def test_layers_copied_one_by_one_keep_what_they_keep_together(
    engine: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = prompt(500, seed=62)
    (together,) = engine.run([ids])
    monkeypatch.setattr(engine.runner.adakv.state, "held_bytes", 1)
    (one_by_one,) = engine.run([ids])
    assert torch.equal(one_by_one.kept, together.kept)
    assert one_by_one.tokens == together.tokens
    _answers_right(one_by_one, reference)


def test_a_prefix_hit_is_really_used(engine: Engine) -> None:
    ids = prompt(400, seed=61)
    engine.run([ids])
    cached = engine.llm.generate(
        [{"prompt_token_ids": ids}], engine.params(max_tokens=2), use_tqdm=False
    )[0].num_cached_tokens
    engine.flush()
    # All whole blocks before the 16 queries of the observation window.
    assert cached == (400 - 16) // 32 * 32


def test_decoded_slabs_are_never_found_as_a_prefix(engine: Engine) -> None:
    ids = prompt(300, seed=7)
    (first,) = engine.run([ids], engine.params(max_tokens=80))
    longer = [*ids, *first.tokens]
    output = engine.llm.generate(
        [{"prompt_token_ids": longer}], engine.params(max_tokens=2), use_tqdm=False
    )[0]
    engine.flush()
    assert output.num_cached_tokens <= 300 // 32 * 32


@pytest.mark.parametrize("length", [513, 520, 600, 1030])
def test_the_window_may_span_chunks(engine: Engine, reference: Reference, length: int) -> None:
    # Chunks have 512 tokens: at 513 and 520 the window lies on both sides of the border.
    (result,) = engine.run([prompt(length, seed=length)])
    _answers_right(result, reference)


def test_mixed_batches_and_budgets(engine: Engine, reference: Reference) -> None:
    options: list[dict[str, Any]] = [
        {},
        {"adakv_policy": "full"},
        {"adakv_budget_tokens": 100},
        {"adakv_keep_ratio": 0.5, "adakv_policy": "snapkv"},
        {"adakv_alpha": 1.0, "adakv_window_tokens": 8},
        {"adakv_budget_tokens": 2000},
    ]
    prompts = [prompt(150 + 37 * index, seed=80 + index) for index in range(len(options))]
    params = [
        engine.params(max_tokens=20 + 5 * index, extra_args=extra)
        for index, extra in enumerate(options)
    ]
    results = engine.run(prompts, params)
    for result in results:
        assert_equals_reference(result, reference, 1e-3)
    skipped = [result.proof["skipped"] for result in results if result.proof]
    assert skipped == [None, "full_requested", None, None, None, "within_budget"]
    assert results[2].proof is not None
    assert results[2].proof["kept_mean"] == 100
    assert results[3].proof is not None
    assert results[3].proof["kept_mean"] == (150 + 37 * 3 + 1) // 2


def test_requests_that_need_no_compression(engine: Engine, reference: Reference) -> None:
    cases = {
        "within_budget": ([prompt(40), engine.params()], 40),
        "no_decode": ([prompt(400, seed=9), engine.params(max_tokens=1)], 400),
        "frees_nothing": ([prompt(70, seed=10), engine.params()], 70),
    }
    for reason, ((ids, params), n) in cases.items():
        (result,) = engine.run([ids], params)
        assert result.proof is not None
        assert result.proof["skipped"] == reason
        assert result.proof["kept_mean"] == n
        assert result.proof["blocks_after"] == result.proof["blocks_before"]
        assert_equals_reference(result, reference, 1e-3)
    for n in (1, 15, 16, 17, 47, 48, 49):
        (result,) = engine.run([prompt(n, seed=n)])
        assert_equals_reference(result, reference, 1e-3)


def test_many_requests_on_one_prefix_share_it(engine: Engine, reference: Reference) -> None:
    shared = prompt(320, seed=11)
    results = engine.run(
        [[*shared, *prompt(20, seed=200 + number)] for number in range(6)],
        engine.params(max_tokens=16),
    )
    reasons = {result.proof["skipped"] for result in results if result.proof}
    assert reasons <= {None, "shared_prefix"}
    assert "shared_prefix" in reasons
    for result in results:
        assert_equals_reference(result, reference, 1e-3)


def test_parallel_samples_have_a_proof(engine: Engine) -> None:
    params = engine.params(max_tokens=6, n=3, temperature=1.0, seed=3)
    outputs = engine.llm.generate(
        [{"prompt_token_ids": prompt(350, seed=12)}], params, use_tqdm=False
    )
    engine.flush()
    assert len(outputs[0].outputs) == 3
    assert "kv_compression" in outputs[0].kv_transfer_params


def test_aborted_requests_leave_nothing(engine: Engine) -> None:
    core = engine.llm.llm_engine
    for number in range(4):
        request = {"prompt_token_ids": prompt(600, seed=400 + number)}
        core.add_request(f"gone-{number}", request, engine.params(max_tokens=200))
    for _ in range(6):
        core.step()
    core.abort_request([f"gone-{number}" for number in range(4)])
    while core.has_unfinished_requests():
        core.step()
    engine.flush()
    engine.assert_nothing_leaked()


def test_an_exported_cache_can_be_restored_elsewhere(engine: Engine, reference: Reference) -> None:
    core, state = engine.llm.llm_engine, engine.runner.adakv.state
    request = {"prompt_token_ids": prompt(500, seed=16)}
    core.add_request("moved", request, engine.params(max_tokens=30))
    tokens: list[int] = []
    moved = False
    while core.has_unfinished_requests():
        for output in core.step():
            tokens = list(output.outputs[0].token_ids)
        if len(tokens) == 10 and not moved:
            (request_id,) = state._rows
            exported = state.export(request_id)
            slabs = engine.manager.slabs_of(request_id)
            kept = state.selections[request_id]
            # The same slabs in another order: every page lands somewhere else.
            for page in state.tables.layout.slab_pages(torch.tensor(slabs)).tolist():
                state._cache.keys[page] = float("nan")
            state.restore(request_id, exported, slabs[::-1])
            state.selections[request_id] = kept
            moved = True
    engine.flush()
    assert moved
    (undisturbed,) = engine.run([prompt(500, seed=16)], engine.params(max_tokens=30))
    assert tokens == undisturbed.tokens


def test_a_value_out_of_bounds_gets_the_operators_settings(engine: Engine) -> None:
    # The validator of an offline engine does not have the operator's bounds.
    (result,) = engine.run(
        [prompt(300, seed=17)], engine.params(extra_args={"adakv_budget_tokens": 100_001})
    )
    assert result.proof is not None
    assert (result.proof["skipped"], result.proof["kept_mean"]) == (None, 48)
    assert "above this server's most" in result.proof["fallback"]


@pytest.mark.parametrize(("keep", "policy"), [(0.5, "defensive"), (0.2, "kv_compress")])
def test_the_proof_of_auto_names_the_preset(
    engine: Engine, reference: Reference, keep: float, policy: str
) -> None:
    options = {"adakv_policy": "auto", "adakv_keep_ratio": keep}
    (result,) = engine.run([prompt(400, seed=70)], engine.params(extra_args=options))
    assert result.proof is not None
    assert result.proof["policy"] == policy
    _answers_right(result, reference)


def test_a_seed_draws_the_same_whether_a_prompt_comes_in_chunks_or_is_cached(
    engine: Engine,
) -> None:
    # 512 tokens a step.
    seeded = engine.params(max_tokens=20, seed=7, temperature=1.0)
    ids = prompt(520, seed=97)
    (chunked,) = engine.run([ids], seeded)
    (cached,) = engine.run([ids], seeded)
    assert chunked.tokens == cached.tokens
    (other,) = engine.run([ids], engine.params(max_tokens=20, seed=8, temperature=1.0))
    assert other.tokens != chunked.tokens


def test_timings_cover_the_steps_in_which_they_were_recorded(engine: Engine) -> None:
    engine.llm.collective_rpc("adakv_start_timings")
    engine.run([prompt(300, seed=98)], engine.params(max_tokens=5))
    (timings,) = engine.llm.collective_rpc("adakv_timings")
    counts = [(prefill, decodes) for _, prefill, decodes, _ in timings["steps"]]
    # The last step only forgets the request.
    assert counts.pop() == (0, 0)
    assert counts == [(300, 0), (0, 1), (0, 1), (0, 1), (0, 1)]
    assert 0 < timings["compress_s"] < timings["steps"][0][0]
    assert timings["plan_s"] > 0
    assert timings["extra_bytes"] > 0


def test_a_cpu_keeps_few_compiled_products(engine: Engine) -> None:
    # test_compiled_products.py shows what that does to the memory. By themselves both keep 1,024.
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        assert int(os.environ[name]) < 1024
