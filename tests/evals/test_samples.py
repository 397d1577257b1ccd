"""Samples and their tokens: repeatable, of the requested length, the same in both modes."""

from typing import Any

import pytest
from transformers import AutoTokenizer

from adakv_serve.evals.samples import MODES, Sample, Turn, tokenize
from adakv_serve.evals.tasks import TASKS, samples
from adakv_serve.serving.models.embedded import embedded_model_path

_NOTHING_TO_FIND = {"code", "continuation", "summaries", "recall", "kinds"}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(embedded_model_path())


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_makes_the_same_samples_each_time(tokenizer: Any, task: str) -> None:
    first, again = (samples(task, tokenizer, 400, 6, seed=3) for _ in range(2))
    assert first == again != samples(task, tokenizer, 400, 6, seed=4)
    assert len({sample.sample_id for sample in first}) == 6


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("tokens", [400, 1500])
def test_documents_have_the_requested_length(tokenizer: Any, task: str, tokens: int) -> None:
    for sample in samples(task, tokenizer, tokens, 3):
        prompt = tokenize(sample, tokenizer, "aware").prompt
        assert 0.7 * tokens < len(prompt) < 1.3 * tokens


@pytest.mark.parametrize("task", TASKS)
def test_both_modes_have_the_same_tokens(tokenizer: Any, task: str) -> None:
    for sample in samples(task, tokenizer, 400, 3):
        aware, agnostic = (tokenize(sample, tokenizer, mode) for mode in MODES)
        assert aware.prompt + aware.forced == agnostic.prompt + agnostic.forced
        assert agnostic.forced[agnostic.answer :] == aware.forced[aware.answer :]
        text = tokenizer.decode(agnostic.prompt + agnostic.forced)
        assert sample.document in text
        assert text.endswith(sample.answer)
        if sample.turns:
            assert sample.turns[0].question in tokenizer.decode(aware.prompt)
            assert sample.turns[0].question not in tokenizer.decode(agnostic.prompt)


@pytest.mark.parametrize("task", sorted(TASKS.keys() - _NOTHING_TO_FIND))
@pytest.mark.parametrize("tokens", [300, 800])
def test_the_document_contains_the_answer_and_the_question_does_not(
    tokenizer: Any, task: str, tokens: int
) -> None:
    for sample in samples(task, tokenizer, tokens, 6):
        for part in sample.answer.strip().split(", "):
            assert part in sample.document
            assert all(part not in turn.question for turn in sample.turns)


def test_later_questions_are_not_compressed_with_the_document(tokenizer: Any) -> None:
    turns = (Turn("What is red?", "Apples."), Turn("What is blue?", ""))
    document = "Apples are red and skies are blue."
    sample = Sample("two", "1", "1", document, turns, " Skies.", cue="Blue are:")
    tokens = tokenize(sample, tokenizer, "aware")
    assert "What is red?" in tokenizer.decode(tokens.prompt)
    assert "What is blue?" not in tokenizer.decode(tokens.prompt)
    assert tokenizer.decode(tokens.forced[tokens.answer :]) == " Skies."


@pytest.mark.parametrize("task", TASKS)
def test_the_compressed_cache_predicts_part_of_every_answer(tokenizer: Any, task: str) -> None:
    for sample in samples(task, tokenizer, 400, 8):
        if not sample.free_tokens:
            tokens = tokenize(sample, tokenizer, "aware")
            assert len(tokens.forced) > tokens.compressed


def test_a_limit_on_questions_takes_more_documents(tokenizer: Any) -> None:
    every = samples("needles", tokenizer, 400, 12)
    assert len({sample.cluster for sample in every}) == 3
    few = samples("needles", tokenizer, 400, 6, questions=2)
    assert len({sample.cluster for sample in few}) == 3
    # A subset of the samples without a limit, so that a run can be resumed with another limit.
    assert {sample.sample_id for sample in few} <= {sample.sample_id for sample in every}


def test_an_unknown_task_is_refused_with_the_known_ones(tokenizer: Any) -> None:
    with pytest.raises(ValueError, match="unknown task 'nedles': known are needles"):
        samples("nedles", tokenizer, 400, 1)
