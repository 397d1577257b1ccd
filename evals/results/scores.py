"""Scores of samples, their means, and intervals over clusters."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from adakv_serve.evals.choice import Choice, Outcome
from adakv_serve.evals.samples import Sample, Tokens

_RESAMPLES = 2000
# An interval over fewer documents is too uncertain to call a difference clear.
_ENOUGH_CLUSTERS = 6
# Reasons for not compressing under which the answer is still the choice's.
_AS_ASKED = (None, "within_budget", "full_requested")


@dataclass(frozen=True)
class Score:
    """Score of one sample under one choice.

    exact: whether each token of the right answer is the most likely one; None without a right
        answer.
    agreement: share of tokens at which the most likely one is the full cache's.
    kl: mean KL(full || this) of the next token, in nats.
    surprise: mean -log p of the answer's tokens, in nats.
    kept_tokens: entries per head on average.
    metric: score of a published set, or ROUGE-L of a summary with the full cache's, 0 to 1.
    skipped: reason for which the engine kept everything.

    Figures are None where a server does not report them.
    """

    sample_id: str
    cluster: str
    exact: bool | None
    agreement: float | None
    kl: float | None
    surprise: float | None
    kept_tokens: float | None
    prompt_tokens: int
    metric: float | None = None
    skipped: str | None = None


def score(sample: Sample, tokens: Tokens, outcome: Outcome, metric: float | None = None) -> Score:
    """Score a sample by its outcome."""
    expected = tokens.forced[tokens.answer :]
    return Score(
        sample.sample_id,
        sample.cluster,
        exact=outcome.predicted == expected if sample.has_answer else None,
        agreement=_mean(outcome.agreement),
        kl=_mean(outcome.kl),
        surprise=_mean(outcome.surprise),
        kept_tokens=outcome.kept_tokens,
        prompt_tokens=len(tokens.prompt),
        metric=metric,
        skipped=outcome.skipped,
    )


class Interval(NamedTuple):
    low: float
    high: float


@dataclass(frozen=True)
class Row:
    """One line of a results file: a task under a choice.

    not_compressed: number of samples that the engine answered with the full cache.
    """

    task: str
    mode: str
    model: str
    policy: str
    kept: str
    document_tokens: int
    n: int
    clusters: int
    kept_tokens: float | None
    exact: float | None
    agreement: float | None
    kl: float | None
    surprise: float | None
    samples: list[dict[str, Any]]
    metric: float | None = None
    not_compressed: int = 0

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def row(
    task: str, mode: str, model: str, document_tokens: int, choice: Choice, scores: Sequence[Score]
) -> Row:
    """Return the means of a task's scores under one choice."""
    return Row(
        task=task,
        mode=mode,
        model=model,
        policy=choice.label,
        kept=choice.kept,
        document_tokens=document_tokens,
        n=len(scores),
        clusters=len({one.cluster for one in scores}),
        kept_tokens=_mean([one.kept_tokens for one in scores]),
        exact=_mean([one.exact for one in scores]),
        agreement=_mean([one.agreement for one in scores]),
        kl=_mean([one.kl for one in scores]),
        surprise=_mean([one.surprise for one in scores]),
        samples=[asdict(one) for one in scores],
        metric=_mean([one.metric for one in scores]),
        not_compressed=sum(one.skipped not in _AS_ASKED for one in scores),
    )


def interval(
    clusters: Sequence[str],
    values: Sequence[float],
    statistic: Callable[[np.ndarray], float] = lambda sums: float(sums[0] / sums[1]),
    seed: int = 0,
) -> Interval:
    """Return the 95 % interval of the mean, by resampling whole clusters.

    Args:
        clusters: the cluster of each value.
        statistic: function from the sum and the count of a resample to its mean.
    """
    names = sorted(set(clusters))
    index = {name: number for number, name in enumerate(names)}
    sums = np.zeros((len(names), 2))
    for name, value in zip(clusters, values, strict=True):
        sums[index[name]] += (value, 1.0)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(names), size=(_RESAMPLES, len(names)))
    means = [statistic(sums[draw].sum(axis=0)) for draw in drawn]
    low, high = np.quantile(means, (0.025, 0.975))
    return Interval(float(low), float(high))


class Difference(NamedTuple):
    """Mean difference of two choices on the same samples, its 95 % interval and clusters."""

    mean: float
    interval: Interval
    clusters: int

    @property
    def is_clear(self) -> bool:
        """Return whether the interval excludes zero and rests on enough clusters."""
        return self.clusters >= _ENOUGH_CLUSTERS and (
            self.interval.low > 0 or self.interval.high < 0
        )


def difference(ours: Row, theirs: Row, measure: str) -> Difference:
    """Return ours minus theirs over the samples that have the measure in both rows.

    Raises:
        ValueError: the rows are of different samples, or no sample has the measure in both.
    """
    pairs = [(one["sample_id"], one["cluster"]) for one in ours.samples]
    if pairs != [(one["sample_id"], one["cluster"]) for one in theirs.samples]:
        raise ValueError("the rows are of different samples")
    both = [
        (a["cluster"], float(a[measure]) - float(b[measure]))
        for a, b in zip(ours.samples, theirs.samples, strict=True)
        if a[measure] is not None and b[measure] is not None
    ]
    if not both:
        raise ValueError(f"no sample has {measure}")
    clusters, values = zip(*both, strict=True)
    return Difference(
        statistics.fmean(values), interval(clusters, values), clusters=len(set(clusters))
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(math.fsum(known) / len(known), 5) if known else None
