"""Whether a measure grows: a robust slope over the second half of its samples."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# A slope from fewer samples is none.
LEAST_SAMPLES = 6
# Memory rises and falls within minutes, so neighbouring samples are not independent. What is looked
# at is the medians of so many spans of time.
_SPANS = 12
# One of twenty measures that stay level has a least slope above 0.
_Z = 1.645
_HOUR_S = 3600.0


class Sample(NamedTuple):
    at_s: float
    value: float


class Limit(NamedTuple):
    """What a measure may grow by. noise: growth over the observed time that means nothing."""

    per_hour: float
    noise: float


class Trend(NamedTuple):
    """A measure over the second half of a run.

    first, last: medians of its ends. least_per_hour: lower end of the slope's confidence interval.
    """

    first: float
    last: float
    per_hour: float
    least_per_hour: float
    grows: bool


class Slope(NamedTuple):
    """A slope per second, and the lower end of its one-sided confidence interval of 95 %."""

    middle: float
    least: float


def theil_sen(samples: Sequence[Sample]) -> Slope:
    """Return the median of the slopes between all pairs of independent samples.

    Up to 29 % of the samples may be anything. Fewer than two different times give 0. The interval
    is Sen's (1968), from the variance of Kendall's statistic.
    """
    slopes = sorted(
        (later.value - earlier.value) / (later.at_s - earlier.at_s)
        for earlier, later in itertools.combinations(samples, 2)
        if later.at_s != earlier.at_s
    )
    if not slopes:
        return Slope(0.0, 0.0)
    n = len(samples)
    deviation = math.sqrt(n * (n - 1) * (2 * n + 5) / 18)
    rank = math.floor((len(slopes) - _Z * deviation) / 2)
    return Slope(statistics.median(slopes), slopes[max(0, rank - 1)])


def _span_medians(samples: Sequence[Sample]) -> list[Sample]:
    """Return the middle time and the median of each of `_SPANS` equal spans that has samples."""
    first_s, last_s = samples[0].at_s, samples[-1].at_s
    spans: dict[int, list[Sample]] = {}
    for sample in samples:
        span = int(_SPANS * (sample.at_s - first_s) / max(last_s - first_s, 1e-9))
        spans.setdefault(min(span, _SPANS - 1), []).append(sample)
    return [
        Sample(
            statistics.fmean(sample.at_s for sample in span),
            statistics.median(sample.value for sample in span),
        )
        for span in spans.values()
    ]


def trend(samples: Sequence[Sample], until_s: float, limit: Limit) -> Trend | None:
    """Return the trend over the second half of a run; None of a process that was not there for it.

    It grows where the slope is above the limit and surely above 0, and the growth over that half
    above the noise.

    Args:
        until_s: the end of the run; samples are since its begin.
    """
    half = [sample for sample in samples if sample.at_s >= until_s / 2]
    if len(half) < LEAST_SAMPLES or half[0].at_s - until_s / 2 > until_s / 8:
        return None
    slope = theil_sen(_span_medians(half))
    end = math.ceil(len(half) / 4)
    grown = slope.middle * (half[-1].at_s - half[0].at_s)
    per_hour, least_per_hour = slope.middle * _HOUR_S, slope.least * _HOUR_S
    return Trend(
        statistics.median(sample.value for sample in half[:end]),
        statistics.median(sample.value for sample in half[-end:]),
        per_hour,
        least_per_hour,
        per_hour > limit.per_hour and least_per_hour > 0 and grown > limit.noise,
    )
