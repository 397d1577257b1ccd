"""Results files: written part by part, resumed."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from adakv_serve.evals.choice import Choice, Outcome
from adakv_serve.evals.gate import RECORDED
from adakv_serve.evals.results.files import finished, read_rows, write_rows
from adakv_serve.evals.results.scores import Row
from adakv_serve.evals.run import Plan, run
from adakv_serve.evals.samples import Sample, Tokens
from adakv_serve.serving.models.embedded import embedded_model_path


def parts() -> Iterator[list[Row]]:
    """Yield rows of two samples of one task and one of another, then interrupt the run."""
    one, other = (replace(read_rows(RECORDED)[0], task=task) for task in ("one", "other"))
    yield [replace(one, n=1)]
    yield [replace(one, n=2)]
    yield [replace(other, n=1)]
    raise KeyboardInterrupt


def test_an_interrupted_run_keeps_its_results(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.jsonl"
    writing = write_rows(parts(), path)
    for expected in ([("one", 1)], [("one", 2)], [("one", 2), ("other", 1)]):
        next(writing)
        assert [(row.task, row.n) for row in read_rows(path)] == expected
    with pytest.raises(KeyboardInterrupt):
        next(writing)
    assert [(row.task, row.n) for row in read_rows(path)] == [("one", 2), ("other", 1)]
    assert list(path.parent.iterdir()) == [path]


def test_the_last_rows_of_each_task_count() -> None:
    first, second = (read_rows(RECORDED)[0] for _ in range(2))
    later = replace(first, n=9)
    other = replace(second, mode="agnostic")
    assert finished([[first], [other], [later]]) == [later, other]


def test_a_file_that_cannot_be_written_fails_before_the_first_measurement(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        next(write_rows(parts(), tmp_path / "file" / "rows.jsonl"))


class Recording:
    """Engine that records the samples it is asked."""

    tokenizer: Any = None

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    def answers(
        self, prompt: list[int], begin: list[int], max_tokens: int, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]:
        raise NotImplementedError

    def outcomes(
        self, sample: Sample, tokens: Tokens, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]:
        found = {choice: Outcome(agreement=[True], kl=[0.5], surprise=[1.0]) for choice in choices}
        self.asked.append((sample.sample_id, [choice.label for choice in found]))
        return found


def test_a_resumed_run_asks_only_missing_samples(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    plan = Plan(["code"], ["aware", "agnostic"], ["snapkv"], [64], [], 256, 3)
    tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())

    def resumed(plan: Plan, parts: int | None = None) -> list[tuple[str, list[str]]]:
        engine = Recording()
        engine.tokenizer = tokenizer
        earlier = read_rows(path) if path.exists() else []
        writing = write_rows(run(engine, "model", plan, earlier), path, earlier)
        list(islice(writing, parts))
        return engine.asked

    first = resumed(plan, parts=4)
    assert len(first) == 4
    rest = resumed(plan)
    assert [choices for _, choices in rest] == [["full", "snapkv"]] * 2
    assert len({sample for sample, _ in first[:3]}) == 3
    assert [(row.mode, row.policy, row.n) for row in read_rows(path)] == [
        (mode, policy, 3) for mode in ("aware", "agnostic") for policy in ("full", "snapkv")
    ]
    assert resumed(plan) == []
    # A run with another policy and another sample asks only these.
    more = resumed(plan._replace(policies=["snapkv", "ada_snapkv"], samples=4, modes=["aware"]))
    assert [choices for _, choices in more] == [["full", "ada_snapkv"]] * 3 + [
        ["full", "snapkv", "ada_snapkv"]
    ]
    assert {(row.mode, row.policy): row.n for row in read_rows(path)} == {
        ("aware", "full"): 4, ("aware", "snapkv"): 4, ("aware", "ada_snapkv"): 4,
        ("agnostic", "full"): 3, ("agnostic", "snapkv"): 3,
    }  # fmt: skip


def test_a_resumed_run_with_fewer_questions_keeps_earlier_samples(tmp_path: Path) -> None:
    plan = Plan(["needles"], ["aware"], ["snapkv"], [64], [], 256, 5)
    engine = Recording()
    engine.tokenizer = AutoTokenizer.from_pretrained(embedded_model_path())
    earlier = finished(run(engine, "model", plan))
    assert [row.clusters for row in earlier] == [2, 2]
    rows = finished(run(engine, "model", plan._replace(samples=3, questions=1), earlier))
    assert [(row.n, row.clusters) for row in rows] == [(6, 3)] * 2


def test_results_of_another_model_cannot_be_resumed(tmp_path: Path) -> None:
    earlier = read_rows(RECORDED)
    plan = Plan(["code"], ["aware"], ["snapkv"], [64], [], 256, 3)
    with pytest.raises(ValueError, match="the results so far are of"):
        next(run(Recording(), "another", plan, earlier))
