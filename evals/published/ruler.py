"""RULER's tasks, from `<folder>/<task>/validation.jsonl` as its `prepare.py` writes them."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from adakv_serve.evals.published import metrics
from adakv_serve.evals.published.questions import Question, read_lines

# By prefix of the task's name.
_MAX_TOKENS = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
# Text before the question in RULER's templates.
_QUESTION_MARKS = ("\nWhat ", "\nQuestion: ", "\n\nAnswer the question based on")


def read_ruler(folder: Path, tasks: Sequence[str] | None = None) -> Iterator[Question]:
    """Yield the questions of `tasks`, or of all tasks that have a file.

    Raises:
        OSError: a file cannot be read.
        ValueError: a task is unknown, or a file is not as RULER writes it.
    """
    found = sorted(path.parent.name for path in folder.glob("*/validation.jsonl"))
    if not (tasks or found):
        raise ValueError(f"{folder} has no <task>/validation.jsonl")
    for task in tasks or found:
        kind = next((kind for kind in _MAX_TOKENS if task.startswith(kind)), None)
        if kind is None:
            raise ValueError(f"unknown task {task}: RULER's begin with {', '.join(_MAX_TOKENS)}")
        rows = read_lines(folder / task / "validation.jsonl", ("input", "outputs"))
        for number, row in enumerate(rows):
            yield _question(task, kind, number, row)


def _question(task: str, kind: str, number: int, row: dict[str, Any]) -> Question:
    metric = metrics.any_of if kind == "qa" else metrics.all_of
    text: str = row["input"]
    edge = max(text.rfind(mark) for mark in _QUESTION_MARKS)
    edge = edge if edge >= 0 else len(text)
    return Question(
        task,
        str(row.get("index", number)),
        text[:edge],
        text[edge:],
        _MAX_TOKENS[kind],
        functools.partial(metric, answers=row["outputs"]),
        prefix=row.get("answer_prefix", ""),
        may_shorten=False,
    )
