"""What running requests will still take, against a step-by-step count."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adakv_worker.admission import Expected, Life, OutputLengths, peak_tokens

SURE = st.builds(Expected, st.integers(0, 300), st.just(0.0))
LIVES = st.lists(st.builds(Life, st.integers(1, 50), SURE, st.none()), max_size=12)
BOUNDED = st.lists(st.builds(Life, st.integers(1, 50), SURE, st.integers(50, 200)), max_size=12)


@given(LIVES)
def test_the_peak_is_the_most_that_they_ever_hold_together(lives: list[Life]) -> None:
    held = [
        sum(life.tokens + step for life in lives if life.to_come.tokens >= step)
        for step in range(301)
    ]
    assert peak_tokens(lives) == max(held)


@given(BOUNDED)
def test_a_bounded_request_counts_with_no_more_than_its_bound(lives: list[Life]) -> None:
    held = [
        sum(
            min(life.tokens + step, life.most_tokens or 0)
            for life in lives
            if life.to_come.tokens >= step
        )
        for step in range(301)
    ]
    assert max(held) <= peak_tokens(lives) <= sum(life.most_tokens or 0 for life in lives)


@given(LIVES, st.floats(0, 100))
def test_what_is_uncertain_adds_up_by_its_variance(lives: list[Life], spread: float) -> None:
    unsure = [life._replace(to_come=Expected(life.to_come.tokens, spread)) for life in lives]
    extra = peak_tokens(unsure) - peak_tokens(lives)
    assert 0 <= extra <= math.ceil(spread * math.sqrt(len(lives)) + 1e-6)


def test_outputs_are_as_long_as_the_last_ones_that_were_longer() -> None:
    lengths = OutputLengths(prior_tokens=100, remembered=3)
    assert lengths.to_come(30, limit=1000) == (70, 0.0)
    assert lengths.to_come(0, limit=60) == (60, 0.0)
    for tokens in (999, 10, 20, 60):
        lengths.note(tokens)
    assert lengths.to_come(0, limit=1000).tokens == 30
    assert lengths.to_come(15, limit=1000) == (25, 20.0)
    # What the limit cuts is not uncertain any more.
    assert lengths.to_come(15, limit=5) == (5, 0.0)
    # Nor can what is left of it bring more than that.
    assert lengths.to_come(0, limit=12) == (11, pytest.approx(12 - 34 / 3))
    assert lengths.to_come(80, limit=1000) == (80, 0.0)
