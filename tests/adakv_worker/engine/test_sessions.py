"""Requests that go on from held caches answer as if every token saw exactly what it saw."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.v1.core.sched.interface import PauseState

from adakv_serve.kernels.policies.presets import PRESETS
from tests.adakv_worker.conversation import SESSIONS, Conversation
from tests.adakv_worker.engine.test_eviction import Traced, run
from tests.adakv_worker.engines import Engine, Reference, assert_equals_reference, prompt


@pytest.fixture(scope="module")
def engine(in_process: None, gqa_model: Path) -> Iterator[Engine]:
    settings = {"budget_tokens": 48, "keep_ratio": 0.5, "sessions": SESSIONS}
    engine = Engine(gqa_model, settings)
    yield engine
    engine.flush()
    engine.assert_nothing_leaked()
    engine.close()


@pytest.fixture(scope="module")
def reference(gqa_model: Path) -> Reference:
    return Reference(gqa_model)


@pytest.mark.parametrize("policy", PRESETS)
def test_three_turns_go_on_from_the_cache(
    engine: Engine, reference: Reference, policy: str
) -> None:
    talk = Conversation(engine, reference, adakv_policy=policy)
    first = talk.turn(prompt(300, seed=1))
    assert talk.proof["session"]["skipped"] == "no_match"
    second = talk.turn([*first.prompt, *first.tokens, *prompt(90, seed=2)])
    # All but the last token of the answer, which was never an input.
    assert talk.proof["session"] == {
        "turn": 2, "resumed_tokens": 311, "computed_tokens": 91, "source": "pool", "skipped": None,
    }  # fmt: skip
    assert talk.proof["original_tokens"] == 402
    assert talk.proof["kept_mean"] == 201
    talk.turn([*second.prompt, *second.tokens, *prompt(90, seed=3)])
    assert talk.resumed == 413
    assert talk.proof["kept_mean"] == 252


def test_an_answer_is_asked_for_again(engine: Engine, reference: Reference) -> None:
    talk = Conversation(engine, reference)
    first = talk.turn(prompt(300, seed=4))
    again = talk.turn(first.prompt)
    assert talk.resumed == 299
    assert again.tokens == first.tokens
    assert talk.proof["kept_mean"] == 150
    # And the conversation goes on from there.
    talk.turn([*again.prompt, *again.tokens, *prompt(80, seed=5)])
    assert talk.resumed == 311


@pytest.mark.parametrize("common", [0, 1, 5, 11])
def test_a_cache_is_cut_back_to_the_common_part(
    engine: Engine, reference: Reference, common: int
) -> None:
    talk = Conversation(engine, reference)
    first = talk.turn(prompt(300, seed=6 + common))
    other = [(token - 2) % 317 + 3 for token in first.tokens[common:]]
    talk.turn([*first.prompt, *first.tokens[:common], *other, *prompt(70, seed=7)])
    assert talk.resumed == 300 + common


def test_a_prompt_that_differs_in_its_window_is_cut_there(
    engine: Engine, reference: Reference
) -> None:
    talk = Conversation(engine, reference, adakv_policy="snapkv")
    first = talk.turn(prompt(300, seed=20))
    # The last 32 entries of the prompt are whole; the one before may be gone.
    talk.turn([*first.prompt[:268], *prompt(60, seed=21)])
    assert talk.resumed == 268
    before = talk.turn(prompt(300, seed=22))
    talk.turn([*before.prompt[:267], *prompt(60, seed=23)])
    assert talk.resumed == 0


def test_new_turns_are_computed_in_chunks(engine: Engine, reference: Reference) -> None:
    talk = Conversation(engine, reference)
    first = talk.turn(prompt(200, seed=24))
    second = talk.turn([*first.prompt, *first.tokens, *prompt(1200, seed=25)])
    assert talk.resumed == 211
    assert talk.proof["kept_mean"] == 706
    talk.turn([*second.prompt, *second.tokens, *prompt(3, seed=26)])
    assert talk.resumed == 1423


def test_turns_of_many_lengths_share_a_batch(engine: Engine, reference: Reference) -> None:
    lengths = [200, 260, 320, 150]
    talks = [Conversation(engine, reference) for _ in lengths]
    params = engine.params(max_tokens=12)
    results = engine.run([prompt(n, seed=30 + n) for n in lengths], params)
    for new in ((1, 5, 60, 200), (300, 1, 2, 33)):
        for talk, result in zip(talks, results, strict=True):
            talk.note(result)
        asked = [
            [*result.prompt, *result.tokens, *prompt(count, seed=40 + count)]
            for result, count in zip(results, new, strict=True)
        ]
        # A new prompt, a prompt within the budget, and a request with policy `full`.
        others = [prompt(150, seed=50 + new[0]), prompt(20, seed=51), prompt(100, seed=52)]
        options = [
            params,
            params,
            engine.params(max_tokens=12, extra_args={"adakv_policy": "full"}),
        ]
        every = engine.run([*asked, *others], [params] * len(talks) + options)
        results, new = every[: len(talks)], every[len(talks) :]
        for result in new:
            assert_equals_reference(result, reference, 1e-3)
    for talk, result in zip(talks, results, strict=True):
        talk.note(result)
        assert talk.resumed > 0


def test_branches_of_one_conversation_get_copies(engine: Engine, reference: Reference) -> None:
    talks = [Conversation(engine, reference) for _ in range(4)]
    first = talks[0].turn(prompt(300, seed=53))
    for talk in talks[1:]:
        talk.tokens, talk.seen, talk._kept = talks[0].tokens, talks[0].seen, talks[0]._kept
    # One of them asks for the first answer again.
    asked = [[*first.prompt, *first.tokens, *prompt(60, seed=54 + n)] for n in range(3)]
    results = engine.run([*asked, first.prompt], engine.params(max_tokens=12))
    for talk, result, resumed in zip(talks, results, (311, 311, 311, 299), strict=True):
        talk.note(result)
        assert talk.resumed == resumed
    # Each leaves a cache of its own.
    further = [[*one.prompt, *one.tokens, *prompt(9, seed=58)] for one in results]
    for talk, result in zip(talks, engine.run(further, engine.params(max_tokens=4)), strict=True):
        talk.note(result)
        assert talk.resumed == len(result.prompt) - 10


def test_all_answers_to_one_turn_go_on_from_its_cache(engine: Engine) -> None:
    (first,) = engine.run([prompt(300, seed=59)], engine.params(max_tokens=12))
    asked = [*first.prompt, *first.tokens, *prompt(60, seed=60)]
    params = engine.params(max_tokens=12, n=3, temperature=1.0, seed=1)
    before = engine.scheduler._manager.held.dropped.copy()
    (output,) = engine.llm.generate([{"prompt_token_ids": asked}], params, use_tqdm=False)
    engine.flush()
    assert len({tuple(answer.token_ids) for answer in output.outputs}) == 3
    assert output.num_cached_tokens == 311
    held = engine.scheduler._manager.held
    left = [one.token_ids.tolist() for one in held]
    assert all([*asked, *answer.token_ids][:-1] in left for answer in output.outputs)
    assert held.dropped == before


BOUND = {"adakv_decode_budget_tokens": 48, "adakv_decode_interval_tokens": 32}


def test_new_turns_join_others_that_decode(engine: Engine, reference: Reference) -> None:
    talks = [Conversation(engine, reference) for _ in range(3)]
    params = engine.params(max_tokens=12)
    results = engine.run([prompt(n, seed=60 + n) for n in (200, 260, 320)], params)
    for talk, result in zip(talks, results, strict=True):
        talk.note(result)
    asked = [
        [*result.prompt, *result.tokens, *prompt(count, seed=70 + count)]
        for result, count in zip(results, (30, 40, 50), strict=True)
    ]
    # Beside compressed decodes: turns of many tokens, a prompt, and one that stays whole.
    fresh, whole = prompt(250, seed=65), prompt(25, seed=66)
    order = [asked[0], whole, asked[1], fresh, asked[2]]
    first, short, second, new, third = engine.run_one_by_one(order, params, 2)
    for talk, result in zip(talks, (first, second, third), strict=True):
        talk.note(result)
        assert talk.resumed > 0
    for result in (short, new):
        assert_equals_reference(result, reference, 1e-3)


def test_a_bounded_cache_goes_on_from_its_last_eviction(
    engine: Engine, reference: Reference
) -> None:
    talk = Conversation(engine, reference)
    params = engine.params(max_tokens=100, extra_args=BOUND)
    asked = prompt(300, seed=70)
    for turn, evictions in enumerate((3, 3, 3)):
        traced = Traced(engine, f"bounded-{turn}", asked, params)
        run(engine, {f"bounded-{turn}": traced})
        result = traced.result
        assert result is not None
        assert result.proof is not None
        talk.note(result, traced.kept_at)
        assert talk.resumed == (len(asked) - 61 if turn else 0)
        assert (result.proof["kept_mean"] <= 150, result.proof["decode_evictions"]) == (
            True, evictions,
        )  # fmt: skip
        # Its tokens never attend to more than the bound.
        last = traced.kept_at[-1]
        assert last is not None
        lens = last.sum(dim=-1)
        assert int(lens.sum()) == lens.numel() * 48
        asked = [*asked, *result.tokens, *prompt(60, seed=71 + turn)]


def test_a_preempted_request_computes_nothing_again(engine: Engine) -> None:
    core = engine.llm.llm_engine
    undisturbed = engine.params(max_tokens=40, extra_args={"adakv_session": "off"})
    (alone,) = engine.run([prompt(300, seed=72)], undisturbed)
    before = engine.scheduler._recomputes.tokens
    core.add_request(
        "victim", {"prompt_token_ids": prompt(300, seed=72)}, engine.params(max_tokens=40)
    )
    outputs: list[Any] = []
    for _ in range(15):
        outputs += core.step()
    (request,) = engine.scheduler.running
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, 0.0)
    while core.has_unfinished_requests():
        outputs += core.step()
    engine.flush()
    proof = outputs[-1].kv_transfer_params["kv_compression"]
    assert proof["session"]["resumed_tokens"] == 314
    assert proof["session"]["computed_tokens"] == 1
    assert engine.scheduler._recomputes.tokens == before
    # It kept what it had: 150 entries of its prompt, and its answer so far.
    assert proof["kept_mean"] == 165
    assert list(outputs[-1].outputs[0].token_ids) == alone.tokens
    # The next turn finds what it left.
    asked = [*prompt(300, seed=72), *outputs[-1].outputs[0].token_ids, *prompt(30, seed=73)]
    (after,) = engine.run([asked], engine.params(max_tokens=4))
    assert after.proof is not None
    assert after.proof["session"]["resumed_tokens"] == 339


def test_a_client_that_leaves_finds_its_cache_again(engine: Engine, reference: Reference) -> None:
    talk = Conversation(engine, reference)
    core = engine.llm.llm_engine
    ids = prompt(300, seed=74)
    core.add_request("leaves", {"prompt_token_ids": ids}, engine.params(max_tokens=40))
    core.step()
    core.abort_request(["leaves"])
    engine.flush()
    kept = engine._kept.pop("leaves")
    seen = torch.ones((300, 300), dtype=torch.bool).tril().expand(*kept.shape[:2], -1, -1)
    talk.tokens, talk.seen, talk._kept = ids, seen, kept
    talk.turn(ids)
    assert talk.resumed == 299


def test_a_client_that_leaves_in_the_middle_of_a_turn_finds_its_part(
    engine: Engine, reference: Reference
) -> None:
    talk = Conversation(engine, reference)
    first = talk.turn(prompt(300, seed=75))
    core = engine.llm.llm_engine
    asked = [*first.prompt, *first.tokens, *prompt(900, seed=76)]
    core.add_request("leaves", {"prompt_token_ids": asked}, engine.params(max_tokens=40))
    core.step()
    core.abort_request(["leaves"])
    engine.flush()
    engine._kept.pop("leaves")
    # A chunk of 512 tokens is there.
    kept = torch.nn.functional.pad(talk._kept, (0, 823 - 300), value=True)
    seen = torch.ones((823, 823), dtype=torch.bool).tril().expand(*kept.shape[:2], -1, -1).clone()
    seen[:, :, :311, :311] = talk.seen[:, :, :311, :311]
    seen[:, :, 311:, :300] &= talk._kept[:, :, None]
    talk.tokens, talk.seen, talk._kept = asked[:823], seen, kept
    talk.turn(asked)
    assert talk.resumed == 823


@pytest.mark.parametrize(
    ("of_first", "of_second"),
    [
        ({"extra_args": {"adakv_session": "off"}}, {}),
        ({}, {"extra_args": {"adakv_session": "off"}}),
        ({}, {"extra_args": {"adakv_policy": "streaming_llm"}}),
        ({}, {"extra_args": {"adakv_budget_tokens": 100}}),
        ({}, {"extra_args": {"adakv_policy": "full"}}),
        ({}, {"prompt_logprobs": 1}),
    ],
    ids=["not left", "off", "policy", "budget", "full", "prompt log-probabilities"],
)
def test_a_cache_is_not_found_by_others(
    engine: Engine, of_first: dict[str, Any], of_second: dict[str, Any]
) -> None:
    ids = prompt(300, seed=80)
    engine.llm.llm_engine.reset_prefix_cache()
    (first,) = engine.run([ids], engine.params(max_tokens=8, **of_first))
    asked = [*ids, *first.tokens, *prompt(30, seed=81)]
    (second,) = engine.run([asked], engine.params(max_tokens=4, **of_second))
    assert second.proof is not None
    assert (second.proof["session"] or {"resumed_tokens": 0})["resumed_tokens"] == 0


@pytest.mark.parametrize("salt", ["a", "b", None])
def test_a_cache_is_found_with_its_salt_alone(engine: Engine, salt: str | None) -> None:
    ids = prompt(300, seed=82)
    engine.llm.llm_engine.reset_prefix_cache()

    def ask(tokens: list[int], of: str | None) -> Any:
        request: Any = {"prompt_token_ids": tokens, **({"cache_salt": of} if of else {})}
        params = engine.params(max_tokens=4)
        (output,) = engine.llm.generate([request], params, use_tqdm=False)
        engine.flush()
        return output

    answer = ask(ids, "a")
    asked = [*ids, *answer.outputs[0].token_ids, *prompt(30, seed=83)]
    output = ask(asked, salt)
    resumed = output.kv_transfer_params["kv_compression"]["session"]["resumed_tokens"]
    assert resumed == (303 if salt == "a" else 0)
    # vLLM counts them as cached.
    assert output.num_cached_tokens == resumed


def test_an_exact_prefix_that_saves_as_much_wins(engine: Engine) -> None:
    # The whole prompt is cached exactly until it is overwritten, and only the answer is not.
    engine.llm.llm_engine.reset_prefix_cache()
    (first,) = engine.run([prompt(320, seed=84)], engine.params(max_tokens=4))
    asked = [*first.prompt, *first.tokens, *prompt(60, seed=85)]
    sessions = engine.scheduler._sessions
    least = sessions._config
    sessions._config = least.model_copy(update={"min_saved_tokens": 64})
    (second,) = engine.run([asked], engine.params(max_tokens=4))
    sessions._config = least
    assert second.proof is not None
    assert second.proof["session"]["skipped"] == "saves_little"


@pytest.mark.parametrize("others_run", [False, True])
def test_a_reset_forgets_all_caches(engine: Engine, others_run: bool) -> None:
    core = engine.llm.llm_engine
    (first,) = engine.run([prompt(300, seed=86 + others_run)], engine.params(max_tokens=4))
    if others_run:
        core.add_request("runs", {"prompt_token_ids": [3]}, engine.params(max_tokens=40))
        core.step()
    # vLLM keeps its prefixes while requests run.
    assert core.reset_prefix_cache() is not others_run
    while core.has_unfinished_requests():
        core.step()
    asked = [*first.prompt, *first.tokens, *prompt(60, seed=87)]
    (second,) = engine.run([asked], engine.params(max_tokens=4))
    assert second.proof is not None
    assert second.proof["session"]["skipped"] == "no_match"


def test_a_paused_engine_takes_no_step_for_what_it_forgot(engine: Engine) -> None:
    engine.run([prompt(300, seed=88)], engine.params(max_tokens=4))
    # The cache is held with the step after its request has ended.
    engine.run([prompt(5, seed=89)], engine.params(max_tokens=1))
    scheduler = engine.scheduler
    scheduler.set_pause_state(PauseState.PAUSED_ALL)
    engine.llm.llm_engine.reset_prefix_cache()
    assert not scheduler.has_requests()
    scheduler.set_pause_state(PauseState.UNPAUSED)
    assert scheduler.has_requests()
    engine.run([prompt(5, seed=89)], engine.params(max_tokens=1))
    assert not scheduler.has_requests()
