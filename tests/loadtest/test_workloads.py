"""Workloads with the embedded model's own tokenizer."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from adakv_serve.loadtest.traffic.traces import read_trace
from adakv_serve.loadtest.traffic.workloads import (
    WORKLOADS,
    Session,
    Sizes,
    Turn,
    request_body,
    sessions,
)
from adakv_serve.serving.models.embedded import embedded_model_path

CONTEXT = 2048


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model_path())


def take(count: int, *args: Any, **kwargs: Any) -> list[Session]:
    return list(itertools.islice(sessions(*args, **kwargs), count))


def last_prompt_tokens(tokenizer: Any, session: Session) -> int:
    """Of a session's last turn, with answers as long as asked for before it."""
    last = len(session.turns) - 1
    answers = ["word " * turn.output_tokens for turn in session.turns[:last]]
    _, body = request_body(session, last, answers, "model")
    if "messages" not in body:
        prompt = body["prompt"]
        return len(prompt) if isinstance(prompt, list) else len(tokenizer.encode(prompt))
    text = tokenizer.apply_chat_template(
        body["messages"], add_generation_prompt=True, tokenize=False
    )
    return len(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("workload", WORKLOADS)
def test_prompts_are_distinct_repeatable_and_fit_the_context(tokenizer: Any, workload: str) -> None:
    made = take(12, workload, tokenizer, CONTEXT, seed=3)
    assert made == take(12, workload, tokenizer, CONTEXT, seed=3)
    assert made != take(12, workload, tokenizer, CONTEXT, seed=4)
    starts = [str(session.turns[0].prompt)[:60] for session in made]
    assert len(set(starts)) == len(starts)
    for session in made:
        output = session.turns[-1].output_tokens
        assert last_prompt_tokens(tokenizer, session) + output <= CONTEXT + 128


@pytest.mark.parametrize("workload", ["long-document-qa", "summarize", "code"])
def test_prompts_are_as_long_as_asked_for(tokenizer: Any, workload: str) -> None:
    for session in take(8, workload, tokenizer, CONTEXT, Sizes(1000, 100)):
        assert abs(last_prompt_tokens(tokenizer, session) - 1000) < 100


def test_synthetic_prompts_are_exact(tokenizer: Any) -> None:
    for session in take(8, "synthetic", tokenizer, CONTEXT, Sizes(777, 33)):
        (turn,) = session.turns
        assert (len(turn.prompt), turn.output_tokens) == (777, 33)


def test_mixed_lengths_have_a_long_tail(tokenizer: Any) -> None:
    made = take(200, "mixed", tokenizer, 8192)
    lengths = sorted(last_prompt_tokens(tokenizer, session) for session in made)
    assert lengths[190] > 3 * lengths[100]


def test_an_agent_takes_many_short_turns_to_a_full_prompt(tokenizer: Any) -> None:
    for session in take(8, "agent", tokenizer, 4096, Sizes(2500, 96)):
        assert 20 <= len(session.turns) <= 40
        assert {turn.output_tokens for turn in session.turns} == {12}
        assert 2000 < last_prompt_tokens(tokenizer, session) < 2800


def test_a_third_of_the_turns_are_asked_again(tokenizer: Any) -> None:
    turns = [
        turn for session in take(60, "regenerate", tokenizer, CONTEXT) for turn in session.turns
    ]
    first, again = (sum(turn.again is wanted for turn in turns) for wanted in (False, True))
    assert 0.2 < again / first < 0.45


def test_an_answer_that_is_asked_for_again_is_not_in_the_history() -> None:
    turns = (Turn("a", 1), Turn("a", 1, again=True), Turn("b", 1), Turn("b", 1, again=True))
    session = Session("s", turns)
    bodies = [
        request_body(session, turn, ["a1", "a2", "b1"][:turn], "model")[1] for turn in range(4)
    ]
    said = [[message["content"] for message in body["messages"]] for body in bodies]
    assert said == [["a"], ["a"], ["a", "a2", "b"], ["a", "a2", "b"]]


def test_a_conversation_carries_its_history(tokenizer: Any) -> None:
    (session,) = take(1, "chat", tokenizer, CONTEXT)
    path, body = request_body(session, 2, ["one", "two"], "model")
    assert path == "/v1/chat/completions"
    roles = [message["role"] for message in body["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert body["messages"][1]["content"] == "one"


def test_what_cannot_be_made_is_refused(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="unknown workload 'poetry': known are long-document-qa"):
        sessions("poetry", tokenizer, CONTEXT)
    with pytest.raises(ValueError, match="exceed the context of 2048"):
        sessions("chat", tokenizer, CONTEXT, Sizes(2000, 100))


def _write(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def test_a_mooncake_trace_shares_what_its_hashes_share(tokenizer: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"timestamp": 3000, "input_length": 1100, "output_length": 5, "hash_ids": [1, 2, 9]},
        {"timestamp": 0, "input_length": 1200, "output_length": 7, "hash_ids": [1, 2, 3]},
    ]
    early, late = read_trace(_write(tmp_path, *rows), tokenizer, 8192)
    (first,), (second,) = early.turns, late.turns
    assert (early.at_s, late.at_s) == (0.0, 3.0)
    assert (len(first.prompt), len(second.prompt)) == (1200, 1100)
    assert first.prompt[:1024] == second.prompt[:1024]
    assert first.prompt[1024:1100] != second.prompt[1024:]


def test_turns_of_a_session_are_beginnings_of_one_text(tokenizer: Any, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"at_s": at, "prompt_tokens": tokens, "output_tokens": 5, "session": name}
        for at, tokens, name in ((0, 300, "a"), (1, 500, "a"), (2, 400, "b"))
    ]
    first, second, other = (
        session.turns[0].prompt for session in read_trace(_write(tmp_path, *rows), tokenizer, 2048)
    )
    assert second[:300] == first
    assert other[:300] != first


@settings(max_examples=20, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 9000), st.integers(1, 3000)), min_size=1, max_size=6)
)
def test_a_trace_is_scaled_until_it_fits(
    tokenizer: Any, tmp_path_factory: Any, lengths: list[tuple[int, int]]
) -> None:
    rows: list[dict[str, Any]] = [
        {"at_s": 0, "prompt_tokens": prompt, "output_tokens": output} for prompt, output in lengths
    ]
    for session in read_trace(_write(tmp_path_factory.mktemp("trace"), *rows), tokenizer, 1024):
        (turn,) = session.turns
        assert 1 <= len(turn.prompt) <= 1024 - turn.output_tokens


def test_a_bad_line_of_a_trace_is_named(tokenizer: Any, tmp_path: Path) -> None:
    row: dict[str, Any] = {"at_s": 0, "prompt_tokens": 5, "output_tokens": 5}
    with pytest.raises(ValueError, match=r"line 2 of the trace: prompt_tokens: .*greater than 0"):
        read_trace(_write(tmp_path, row, {**row, "prompt_tokens": 0}), tokenizer, 1024)
    with pytest.raises(ValueError, match="holds no requests"):
        read_trace(_write(tmp_path), tokenizer, 1024)
