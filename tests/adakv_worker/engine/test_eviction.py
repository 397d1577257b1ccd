"""Requests whose caches are evicted while they decode, on a real engine."""

from typing import Any

import pytest
import torch

from adakv_serve.kernels.policies.presets import PRESETS
from tests.adakv_worker.engines import Engine, Reference, Result, assert_equals_reference, prompt

BOUND = {"adakv_decode_budget_tokens": 48, "adakv_decode_interval_tokens": 32}


class Traced:
    """A request and the entries that each of its steps attended to."""

    def __init__(self, engine: Engine, name: str, ids: list[int], params: Any) -> None:
        self._state = engine.runner.adakv.state
        self._name = name
        self._ids = ids
        self.kept_at: list[torch.Tensor | None] = []
        self.result: Result | None = None
        engine.llm.llm_engine.add_request(name, {"prompt_token_ids": ids}, params)

    def before_step(self) -> torch.Tensor | None:
        for name, kept in self._state.selections.items():
            if name.startswith(f"{self._name}-"):
                return kept.clone()
        return None

    def note(self, output: Any, kept: torch.Tensor | None) -> None:
        (answer,) = output.outputs
        self.kept_at += [kept] * (len(answer.token_ids) - len(self.kept_at))
        logprobs = [{t: e.logprob for t, e in step.items()} for step in answer.logprobs]
        proof = (output.kv_transfer_params or {}).get("kv_compression")
        self.result = Result(
            self._ids, list(answer.token_ids), logprobs, proof, None, answer.finish_reason
        )


def _steps_behind(engine: Engine) -> int:
    # The asynchronous scheduler gets a step's outputs after it has started the next one.
    return int(engine.scheduler.scheduler_config.async_scheduling)


def run(engine: Engine, requests: dict[str, Traced]) -> None:
    core = engine.llm.llm_engine
    seen: list[dict[str, torch.Tensor | None]] = []
    while core.has_unfinished_requests():
        seen.append({name: traced.before_step() for name, traced in requests.items()})
        for output in core.step():
            kept = seen[max(0, len(seen) - 1 - _steps_behind(engine))]
            requests[output.request_id].note(output, kept[output.request_id])
    engine.flush()


@pytest.mark.parametrize("policy", PRESETS)
def test_every_step_attends_to_exactly_the_kept_entries(
    engine: Engine, reference: Reference, policy: str
) -> None:
    options = {**BOUND, "adakv_policy": policy, "adakv_budget_tokens": 48}
    bounded = engine.params(max_tokens=100, extra_args=options)
    unbounded = engine.params(max_tokens=60, extra_args={"adakv_policy": policy})
    # One shorter than the window, one within the budget, one that is compressed; and others that
    # evict nothing in the same steps.
    requests = {
        f"{length}": Traced(engine, f"{length}", prompt(length, seed=length), params)
        for length, params in ((5, bounded), (40, bounded), (300, bounded), (200, unbounded))
    }
    run(engine, requests)
    for name, traced in requests.items():
        result = traced.result
        assert result is not None
        assert result.proof is not None
        length = int(name)
        if length != 200:
            evictions = (min(length, 48) + 99 - 48) // 32
            assert result.proof["decode_evictions"] == evictions
            last = traced.kept_at[-1]
            assert last is not None
            lens = last.sum(dim=-1)
            assert int(lens.sum()) == lens.numel() * 48
            assert bool(last[..., :4].all()), "the sinks are not kept"
        assert_equals_reference(result, reference, 1e-3, traced.kept_at)


def test_a_bounded_request_never_holds_more_blocks_than_its_bound(engine: Engine) -> None:
    before = engine.free_blocks
    core = engine.llm.llm_engine
    params = engine.params(max_tokens=600, extra_args=BOUND)
    core.add_request("long", {"prompt_token_ids": prompt(300)}, params)
    for _ in range(3):
        core.step()
    held = []
    while core.has_unfinished_requests():
        held.append(before - engine.free_blocks)
        core.step()
    engine.flush()
    assert max(held) == (48 + 32 + 31 + 31) // 32
    assert engine.free_blocks == before


def test_a_preempted_request_goes_on_within_its_bound(engine: Engine) -> None:
    core = engine.llm.llm_engine
    params = engine.params(max_tokens=200, extra_args=BOUND)
    core.add_request("victim", {"prompt_token_ids": prompt(300)}, params)
    for _ in range(120):
        core.step()
    (request,) = engine.scheduler.running
    evicted = engine.scheduler._proofs.get(request.request_id).decode_evictions
    left = 200 - request.num_output_tokens
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    outputs: list[Any] = []
    while core.has_unfinished_requests():
        outputs += core.step()
    engine.flush()
    output = outputs[-1]
    assert len(output.outputs[0].token_ids) == 200
    # Its answer so far was part of the compressed tokens.
    proof = output.kv_transfer_params["kv_compression"]
    assert proof["original_tokens"] > 400
    assert proof["decode_evictions"] == evicted + (left - 1) // 32
    assert evicted == 3


def test_a_request_that_is_preempted_before_its_last_token_stays_whole(engine: Engine) -> None:
    core = engine.llm.llm_engine
    params = engine.params(max_tokens=120, extra_args=BOUND)
    core.add_request("victim", {"prompt_token_ids": prompt(300)}, params)
    core.step()
    (request,) = engine.scheduler.running
    while request.num_output_tokens < 119 - _steps_behind(engine):
        core.step()
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    outputs: list[Any] = []
    while core.has_unfinished_requests():
        outputs += core.step()
    engine.flush()
    proof = outputs[-1].kv_transfer_params["kv_compression"]
    assert proof["skipped"] == "no_decode"
    assert proof["decode_evictions"] == 3


def test_a_table_row_holds_a_whole_context_and_its_slabs(engine: Engine) -> None:
    # All entries stay, and their slabs are one more than the prompt's blocks.
    options = {
        "adakv_policy": "streaming_llm", "adakv_keep_ratio": 1.0,
        "adakv_decode_budget_tokens": 2018, "adakv_decode_interval_tokens": 16,
    }  # fmt: skip
    params = engine.params(max_tokens=20, extra_args=options)
    (result,) = engine.run([prompt(2018)], params)
    assert result.proof is not None
    assert result.proof["blocks_after"] == result.proof["blocks_before"] + 1
    assert len(result.tokens) == 20


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adakv_decode_budget_tokens": 23}, "below the observation window of 20 and 4 sinks"),
        (
            {"adakv_decode_budget_tokens": 64, "adakv_decode_interval_tokens": 18},
            "adakv_decode_interval_tokens=18 is below the observation window of 20",
        ),
        ({"adakv_decode_interval_tokens": 15}, "below this server's least, 16"),
        ({"adakv_decode_interval_tokens": 5000}, "above this server's most, 1024"),
        ({"adakv_decode_interval_tokens": 64}, "there is no adakv_decode_budget_tokens"),
        ({"adakv_decode_budget_tokens": 200_000}, "above this server's most"),
    ],
)
def test_bad_bounds_are_refused(options: dict[str, Any], message: str) -> None:
    from adakv_worker.config import CompressionConfig
    from adakv_worker.options import RequestOptions

    config = CompressionConfig(window_tokens=20, min_budget_tokens=1, max_budget_tokens=100_000)
    with pytest.raises(ValueError, match=message):
        RequestOptions.of(options).budget(config)


def test_an_operators_bound_fits_any_policy_that_a_request_names() -> None:
    from adakv_worker.config import CompressionConfig
    from adakv_worker.options import RequestOptions

    config = CompressionConfig(
        policy="streaming_llm", decode_budget_tokens=8, decode_interval_tokens=4
    )
    assert RequestOptions().budget(config).decode == (8, 4)
    assert RequestOptions(policy="snapkv").budget(config).decode == (36, 32)
    assert RequestOptions(policy="full").budget(config).decode is None
    with pytest.raises(ValueError, match="decode_budget_tokens=8 is below the observation window"):
        CompressionConfig(decode_budget_tokens=8)


def test_other_prompts_arrive_in_chunks_while_a_request_evicts(
    engine: Engine, reference: Reference
) -> None:
    bounded = engine.params(max_tokens=90, extra_args={**BOUND, "adakv_budget_tokens": 48})
    requests = {"long": Traced(engine, "long", prompt(300, seed=7), bounded)}
    core, kept = engine.llm.llm_engine, None
    # The step after the next evicts; prompts of three chunks arrive before it.
    for _ in range(31):
        kept = requests["long"].before_step()
        for output in core.step():
            requests[output.request_id].note(output, kept)
    for name in ("first", "second"):
        requests[name] = Traced(engine, name, prompt(1200, seed=len(name)), bounded)
    run(engine, requests)
    for traced in requests.values():
        assert traced.result is not None
        assert_equals_reference(traced.result, reference, 1e-3, traced.kept_at)
        assert traced.result.proof is not None
        assert traced.result.proof["decode_evictions"] == 89 // 32


def test_several_answers_to_one_prompt_evict_independently(engine: Engine) -> None:
    before = engine.free_blocks
    params = engine.params(max_tokens=120, n=3, temperature=1.0, seed=5, extra_args={**BOUND})
    (output,) = engine.llm.generate([{"prompt_token_ids": prompt(300)}], params, use_tqdm=False)
    engine.flush()
    assert [len(answer.token_ids) for answer in output.outputs] == [120] * 3
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
    assert output.kv_transfer_params["kv_compression"]["decode_evictions"] == 119 // 32
    assert engine.free_blocks == before
