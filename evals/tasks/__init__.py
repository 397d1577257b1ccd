"""Tasks like LongBench's and RULER's, made from open texts with a seed."""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from adakv_serve.evals.samples import Sample
from adakv_serve.evals.tasks.continuing import code_next_lines, continuation, summaries
from adakv_serve.evals.tasks.documents import factbook
from adakv_serve.evals.tasks.examples import kinds
from adakv_serve.evals.tasks.retrieval import (
    key_values,
    multi_turn_needles,
    multi_value_needles,
    needles,
    recall,
)
from adakv_serve.evals.tasks.source import Source

TASKS: dict[str, Callable[[Source], Iterator[Sample]]] = {
    "needles": needles,
    "multi_value_needles": multi_value_needles,
    "multi_turn_needles": multi_turn_needles,
    "key_values": key_values,
    "recall": recall,
    "factbook": factbook,
    "kinds": kinds,
    "code": code_next_lines,
    "continuation": continuation,
    "summaries": summaries,
}


def samples(
    task: str,
    tokenizer: Any,
    document_tokens: int,
    count: int,
    seed: int = 0,
    questions: int | None = None,
) -> list[Sample]:
    """Return the first `count` samples of a task, equal for equal arguments.

    Args:
        questions: most questions about one document; None for all of the task. Intervals are over
            documents: fewer questions about more documents narrow them.

    Raises:
        ValueError: the task is unknown.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task '{task}': known are {', '.join(TASKS)}")
    rng = random.Random(f"{task}:{document_tokens}:{seed}")
    every = TASKS[task](Source(tokenizer, document_tokens, rng))
    return list(islice(_few_of_each(every, questions), count))


def _few_of_each(every: Iterator[Sample], questions: int | None) -> Iterator[Sample]:
    asked: Counter[str] = Counter()
    for sample in every:
        asked[sample.cluster] += 1
        if questions is None or asked[sample.cluster] <= questions:
            yield sample
