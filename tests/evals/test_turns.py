"""Conversations go on: each turn's prompt begins with the turn before and its answer."""

import itertools
from typing import Any

import pytest
from transformers import AutoTokenizer

from adakv_serve.evals.choice import FULL, Choice
from adakv_serve.evals.turns import TASKS, conversations, run_turns, tokenize_turn
from adakv_serve.serving.models.embedded import embedded_model_path

TURNS = 6


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model_path())


def test_a_conversation_may_have_a_single_turn(tokenizer: Any) -> None:
    assert [len(talk) for talk in conversations(TASKS[0], tokenizer, 512, 2, 1)] == [1, 1]


@pytest.mark.parametrize("task", TASKS)
def test_a_turn_begins_with_the_turns_before(tokenizer: Any, task: str) -> None:
    made = list(conversations(task, tokenizer, 512, 2, TURNS))
    assert len({talk[0].document for talk in made}) == len(made) == 2
    for talk in made:
        assert [sample.task for sample in talk] == [f"turn {n}" for n in range(1, TURNS + 1)]
        # The last turns ask what the first ones did.
        assert talk[-1].answer in (talk[0].answer, talk[1].answer)
        tokens = [tokenize_turn(sample, tokenizer) for sample in talk]
        for before, after in itertools.pairwise(tokens):
            history = [*before.prompt, *before.forced]
            assert after.prompt[: len(history)] == history


def test_a_choice_says_what_becomes_of_the_history() -> None:
    sent = {
        session: Choice("auto", ratio=0.5, session=session).xargs().get("adakv_session")
        for session in ("off", "newest", "all", None)
    }
    assert sent == {"off": "off", "newest": "auto", "all": "auto", None: None}
    assert Choice("auto", ratio=0.5, session="all").label == "auto session=all"


def test_turns_resume_what_the_turns_before_have_left(in_process: None) -> None:
    from adakv_serve.evals.answering.engine import ForcedEngine

    sessions = {"enabled": True, "min_saved_tokens": 1}
    engine = ForcedEngine(embedded_model_path(), 2048, 256 << 20, sessions=sessions)
    choices = [Choice("auto", ratio=0.5, session=session) for session in ("off", "newest")]
    *_, rows = run_turns(engine, "m", ["factbook"], choices, 512, 1, 3)
    by_turn = {(row.task, row.policy): row for row in rows}
    assert len(by_turn) == 9
    for turn in ("turn 1", "turn 2", "turn 3"):
        assert by_turn[turn, FULL].kl == pytest.approx(0, abs=1e-6)
    # Both compress the first turn alike, and the next ones otherwise.
    first, fresh = (by_turn["turn 1", f"auto session={s}"].kl for s in ("newest", "off"))
    assert first == pytest.approx(fresh)
    later, anew = (by_turn["turn 3", f"auto session={s}"] for s in ("newest", "off"))
    assert later.kl != pytest.approx(anew.kl)
    assert later.kept_tokens is not None
    assert anew.kept_tokens is not None
    # The newest window stays, even of a turn that is hardly longer.
    assert anew.kept_tokens <= later.kept_tokens <= anew.kept_tokens + 32
    engine.close()
