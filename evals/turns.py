"""Conversations about one document: what the caches of later turns lose."""

from collections.abc import Iterator, Sequence
from itertools import cycle, groupby, islice
from typing import Any

from adakv_serve.evals.answering import Answering
from adakv_serve.evals.choice import FULL, Choice
from adakv_serve.evals.results.scores import Row, Score, row, score
from adakv_serve.evals.samples import Sample, Tokens, Turn, chat_text
from adakv_serve.evals.tasks import samples

# Tasks with several questions about each document.
TASKS = ("needles", "factbook", "recall")


def conversations(
    task: str, tokenizer: Any, document_tokens: int, count: int, turns: int, seed: int = 0
) -> Iterator[list[Sample]]:
    """Yield conversations of `turns` turns, each as a sample with the turns before it.

    When a document's questions have been asked, the first ones are asked once more: their answers
    are in the document and in the conversation.
    """
    every = samples(task, tokenizer, document_tokens, 16 * count, seed)
    of_documents = (list(one) for _, one in groupby(every, key=lambda sample: sample.cluster))
    for asked in islice(of_documents, count):
        yield _conversation(list(islice(cycle(asked[: max(1, turns - 1)]), turns)))


def _conversation(asked: Sequence[Sample]) -> list[Sample]:
    history: tuple[Turn, ...] = ()
    turns = []
    for number, sample in enumerate(asked, start=1):
        question = sample.turns[-1].question
        own = Sample(
            f"turn {number}", f"{sample.cluster}/{number}", sample.cluster, sample.document,
            (*history, Turn(question, "")), sample.answer, sample.cue,
        )  # fmt: skip
        turns.append(own)
        history += (Turn(question, sample.cue + sample.answer),)
    return turns


def tokenize_turn(sample: Sample, tokenizer: Any) -> Tokens:
    """Return a turn's tokens: everything before the answer is its prompt."""
    prompt = tokenizer(chat_text(sample, tokenizer), add_special_tokens=False)["input_ids"]
    return Tokens(prompt, tokenizer.encode(sample.answer, add_special_tokens=False), 0)


def run_turns(
    engine: Answering,
    model: str,
    tasks: Sequence[str],
    choices: Sequence[Choice],
    document_tokens: int,
    count: int,
    turns: int,
    seed: int = 0,
) -> Iterator[list[Row]]:
    """Yield the rows of all turns and choices, the full cache's first, after each conversation.

    The answers are forced, so that all choices have the same history.
    """
    every = [Choice(FULL), *choices]
    scores: dict[tuple[str, Choice], list[Score]] = {}
    for task in tasks:
        talks = conversations(task, engine.tokenizer, document_tokens, count, turns, seed)
        for talk in talks:
            for sample in talk:
                tokens = tokenize_turn(sample, engine.tokenizer)
                for choice, outcome in engine.outcomes(sample, tokens, choices).items():
                    one = score(sample, tokens, outcome)
                    scores.setdefault((sample.task, choice), []).append(one)
            yield [
                row(name, "aware", model, document_tokens, choice, scores[name, choice])
                for name in dict.fromkeys(sample.task for sample in talk)
                for choice in every
            ]
