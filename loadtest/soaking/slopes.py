"""Whether a measure grows: a robust slope over the second half of its samples."""

import itertools
import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

# A slope from fewer samples is none.
LEAST_SAMPLES = 6
_HOUR_S = 3600.0


class Sample(NamedTuple):
    at_s: float
    value: float


class Limit(NamedTuple):
    """What a measure may grow by. noise: growth over the observed time that means nothing."""

    per_hour: float
    noise: float


class Trend(NamedTuple):
    """A measure over the second half of a run. first, last: medians of its ends."""

    first: float
    last: float
    per_hour: float
    grows: bool


def theil_sen(samples: Sequence[Sample]) -> float:
    """Return the median of the slopes between all pairs of samples, per second.

    Up to 29 % of the samples may be anything. Fewer than two different times give 0.
    """
    slopes = [
        (later.value - earlier.value) / (later.at_s - earlier.at_s)
        for earlier, later in itertools.combinations(samples, 2)
        if later.at_s != earlier.at_s
    ]
    return statistics.median(slopes) if slopes else 0.0


def trend(samples: Sequence[Sample], until_s: float, limit: Limit) -> Trend | None:
    """Return the trend over the second half of a run; None of a process that was not there for it.

    It grows where the slope is above the limit, and the growth over that half above the noise.

    Args:
        until_s: the end of the run; samples are since its begin.
    """
    half = [sample for sample in samples if sample.at_s >= until_s / 2]
    if len(half) < LEAST_SAMPLES or half[0].at_s - until_s / 2 > until_s / 8:
        return None
    slope = theil_sen(half)
    end = math.ceil(len(half) / 4)
    grown = slope * (half[-1].at_s - half[0].at_s)
    return Trend(
        statistics.median(sample.value for sample in half[:end]),
        statistics.median(sample.value for sample in half[-end:]),
        slope * _HOUR_S,
        slope * _HOUR_S > limit.per_hour and grown > limit.noise,
    )
