"""Tasks after LongBench's and RULER's types, made from open texts with a seed."""

import random
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from evals.samples import Sample
from evals.tasks.continuing import code_next_lines, continuation, summaries
from evals.tasks.documents import factbook
from evals.tasks.examples import kinds
from evals.tasks.retrieval import (
    key_values,
    multi_turn_needles,
    multi_value_needles,
    needles,
    recall,
)
from evals.tasks.source import Source

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
    task: str, tokenizer: Any, document_tokens: int, count: int, seed: int = 0
) -> list[Sample]:
    """The first `count` samples, the same for equal arguments.

    Raises:
        ValueError: there is no such task.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task '{task}': known are {', '.join(TASKS)}")
    rng = random.Random(f"{task}:{document_tokens}:{seed}")
    return list(islice(TASKS[task](Source(tokenizer, document_tokens, rng)), count))
