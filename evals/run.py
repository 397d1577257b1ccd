"""Runs of tasks under policies and budgets."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from adakv_serve.evals.answering import Answering
from adakv_serve.evals.choice import FULL, Choice
from adakv_serve.evals.published import metrics
from adakv_serve.evals.results.scores import Row, Score, row, score
from adakv_serve.evals.samples import Mode, Sample, Tokens, tokenize
from adakv_serve.evals.tasks import samples


class Plan(NamedTuple):
    """What a run measures.

    policies: names of presets.
    budgets: entries per head on average.
    ratios: shares of the prompt.
    samples: number of samples of each task.
    questions: most questions about one document; None for all.
    """

    tasks: Sequence[str]
    modes: Sequence[Mode]
    policies: Sequence[str]
    budgets: Sequence[int]
    ratios: Sequence[float]
    document_tokens: int
    samples: int
    seed: int = 0
    questions: int | None = None

    def choices(self) -> list[Choice]:
        return choices(self.policies, self.budgets, self.ratios)


def choices(
    policies: Sequence[str], budgets: Sequence[int], ratios: Sequence[float]
) -> list[Choice]:
    """Return every policy with every budget and every ratio."""
    return [
        *(Choice(policy, tokens=budget) for policy in policies for budget in budgets),
        *(Choice(policy, ratio=ratio) for policy in policies for ratio in ratios),
    ]


def run(
    engine: Answering, model: str, plan: Plan, earlier: Iterable[Row] = ()
) -> Iterator[list[Row]]:
    """Yield rows of one task in one mode after the other, the full cache's first.

    They come after each sample and replace the last rows of that task and mode.

    Args:
        earlier: rows of an earlier run; their samples are not asked again.

    Raises:
        ValueError: the earlier rows are of another model or document length.
    """
    known: dict[tuple[str, str, str, str], dict[str, Score]] = {}
    for one in earlier:
        if (one.model, one.document_tokens) != (model, plan.document_tokens):
            raise ValueError(
                f"the results so far are of {one.model} and {one.document_tokens} tokens"
            )
        by_sample = {sample["sample_id"]: Score(**sample) for sample in one.samples}
        known[one.mode, one.task, one.policy, one.kept] = by_sample
    for mode in plan.modes:
        for task in plan.tasks:
            before = {
                choice: known.get((mode, task, choice.label, choice.kept), {})
                for choice in [Choice(FULL), *plan.choices()]
            }
            yield from _run_task(engine, model, plan, task, mode, before)


def _run_task(
    engine: Answering,
    model: str,
    plan: Plan,
    task: str,
    mode: Mode,
    known: Mapping[Choice, Mapping[str, Score]],
) -> Iterator[list[Row]]:
    """Yield the rows of one task in one mode.

    Args:
        known: scores of an earlier run, by choice and sample.
    """
    asked = samples(
        task, engine.tokenizer, plan.document_tokens, plan.samples, plan.seed, plan.questions
    )
    scores = {choice: dict(by_sample) for choice, by_sample in known.items()}

    def rows() -> list[Row]:
        # Further samples of an earlier run stay.
        names = [one.sample_id for one in asked] + [one for done in scores.values() for one in done]
        return [
            row(
                task, mode, model, plan.document_tokens, choice,
                [by_sample[name] for name in dict.fromkeys(names) if name in by_sample],
            )
            for choice, by_sample in scores.items()
        ]  # fmt: skip

    has_asked = False
    for sample in asked:
        missing = [choice for choice, found in scores.items() if sample.sample_id not in found]
        if not missing:
            continue
        has_asked = True
        tokens = tokenize(sample, engine.tokenizer, mode)
        score_sample = _score_free if sample.free_tokens else _score_forced
        # Each outcome is compared with the full cache's.
        asked_for = [Choice(FULL), *(choice for choice in missing if choice.policy != FULL)]
        for choice, one in score_sample(engine, sample, tokens, asked_for).items():
            scores[choice][sample.sample_id] = one
        yield rows()
    if not has_asked:
        yield rows()


def _score_forced(
    engine: Answering, sample: Sample, tokens: Tokens, choices: Sequence[Choice]
) -> dict[Choice, Score]:
    outcomes = engine.outcomes(sample, tokens, choices)
    return {choice: score(sample, tokens, outcome) for choice, outcome in outcomes.items()}


def _score_free(
    engine: Answering, sample: Sample, tokens: Tokens, choices: Sequence[Choice]
) -> dict[Choice, Score]:
    outcomes = engine.answers(tokens.prompt, tokens.forced, sample.free_tokens, choices)
    texts = {
        choice: engine.tokenizer.decode(outcome.predicted, skip_special_tokens=True)
        for choice, outcome in outcomes.items()
    }
    whole = texts[Choice(FULL)]
    return {
        choice: score(sample, tokens, outcome, metrics.rouge_l(texts[choice], whole))
        for choice, outcome in outcomes.items()
    }
