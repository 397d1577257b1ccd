"""Runs of published questions under choices."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from adakv_serve.evals.answering import Answering
from adakv_serve.evals.choice import FULL, Choice, Outcome
from adakv_serve.evals.published.questions import Question
from adakv_serve.evals.results.scores import Row, Score, row
from adakv_serve.evals.samples import Mode


def run_published(
    engine: Answering,
    model: str,
    questions: Iterable[Question],
    choices: Sequence[Choice],
    mode: Mode,
    context_tokens: int,
    limit: int | None = None,
) -> Iterator[list[Row]]:
    """Yield the rows of one task after the other, the full cache's first.

    Args:
        limit: number of questions of each task; None for all.
    """
    every = list(dict.fromkeys([Choice(FULL), *choices]))
    for task, asked in itertools.groupby(questions, lambda question: question.task):
        scores: dict[Choice, list[Score]] = {choice: [] for choice in every}
        for question in itertools.islice(asked, limit):
            prompt, begin = question.prompt(engine.tokenizer, context_tokens, mode)
            answered = engine.answers(prompt, begin, question.max_tokens, every)
            for choice, outcome in answered.items():
                text = engine.tokenizer.decode(outcome.predicted, skip_special_tokens=True)
                scores[choice].append(_score(question, text, outcome, len(prompt)))
        yield [row(task, mode, model, context_tokens, one, scores[one]) for one in every]


def _score(question: Question, text: str, outcome: Outcome, prompt_tokens: int) -> Score:
    return Score(
        question.sample_id,
        question.cluster,
        exact=None,
        agreement=None,
        kl=None,
        surprise=None,
        kept_tokens=outcome.kept_tokens,
        prompt_tokens=prompt_tokens,
        metric=question.rate(text),
        skipped=outcome.skipped,
    )
