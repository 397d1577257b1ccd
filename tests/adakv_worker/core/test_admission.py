"""The blocks that running requests will still take, against a step-by-step count."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adakv_worker.core.admission import Holds
from adakv_worker.core.answer_lengths import AnswerLengths
from adakv_worker.core.lives import LifeTable, Lives
from adakv_worker.core.plan import UNBOUNDED, Life


def _sure(room: int, to_come: int, most: int = UNBOUNDED, per_token: int = 1) -> Life:
    """Return the life of a request whose length is certain."""
    return Life(room, most, per_token, answered=0, left=to_come, due=to_come, max_tokens=to_come)


def _life(answered: int, left: int, due: int, max_tokens: int) -> Life:
    return Life(0, UNBOUNDED, 1, answered, left, due, max_tokens)


LENGTHS = AnswerLengths(prior_tokens=100)
LIVES = st.lists(st.builds(_sure, st.integers(1, 50), st.integers(0, 300)), max_size=12)
BOUNDED = st.lists(
    st.builds(_sure, st.integers(1, 50), st.integers(0, 300), st.integers(50, 200)), max_size=12
)
# Whole requests beside compressed ones in pages of fewer bits: their tokens take more room.
RATES = st.sampled_from([1, 2, 4])
MIXED = st.lists(
    st.builds(_sure, st.integers(1, 50), st.integers(0, 300), st.just(UNBOUNDED), RATES),
    max_size=12,
)


def _lives(lives: list[Life], lengths: AnswerLengths) -> Lives:
    table = LifeTable()
    for index, life in enumerate(lives):
        table.put(str(index), life, 0)
    return table.lives(lengths, 0)


def _held(lives: list[Life], step: int) -> int:
    return sum(
        min(life.room + step * life.per_token, life.most_room)
        for life in lives
        if life.left >= step
    )


@given(MIXED)
def test_the_peak_is_the_most_that_they_ever_hold_together(lives: list[Life]) -> None:
    held = [_held(lives, step) for step in range(301)]
    assert _lives(lives, LENGTHS).peak_room() == max(held)


@given(BOUNDED)
def test_a_bounded_request_counts_with_no_more_than_its_bound(lives: list[Life]) -> None:
    held = [_held(lives, step) for step in range(301)]
    peak = _lives(lives, LENGTHS).peak_room()
    assert max(held) <= peak <= sum(life.most_room for life in lives)


@given(MIXED, st.builds(_sure, st.integers(1, 50), st.integers(0, 300), per_token=RATES))
def test_the_peak_with_another_counts_up_to_its_end(lives: list[Life], other: Life) -> None:
    together = [_held([*lives, other], step) for step in range(other.left + 1)]
    to_come = LENGTHS.one_to_come(other)
    assert to_come == (other.left, 0)
    assert _lives(lives, LENGTHS).peak_with(other, to_come) == max(together)


@given(LIVES, st.integers(1, 300), st.integers(1, 60))
def test_what_is_uncertain_adds_up_by_its_variance(
    lives: list[Life], low: int, others: int
) -> None:
    lengths = AnswerLengths(prior_tokens=low)
    lengths.note(1 << 9, low + 100)
    unsure = [life._replace(due=0, left=1000, max_tokens=1 << 9) for life in lives]
    # Two lengths that have been seen, 100 apart, deviate by 50 from their mean.
    mean, spread = low + 50, 50 * math.sqrt(len(lives))
    exact = sum(life.room for life in lives) + len(lives) * mean
    assert _lives(unsure, lengths).peak_room() == exact + math.ceil(spread)


@given(LIVES.filter(len), st.integers(1, 50), st.integers(1, 400), st.integers(1, 300))
def test_uncertainty_counts_beside_another_request_too(
    lives: list[Life], tokens: int, low: int, end: int
) -> None:
    lengths = AnswerLengths(prior_tokens=low)
    lengths.note(1 << 9, low + 100)
    unsure = [life._replace(due=0, left=1000, max_tokens=1 << 9) for life in lives]
    # All are there until the first end: the others' expected one, or the certain one's.
    first = min(low + 50, end)
    exact = sum(life.room for life in lives) + tokens + (len(lives) + 1) * first
    with_other = _lives(unsure, lengths).peak_with(_sure(tokens, end), (end, 0.0))
    assert with_other == max(exact + math.ceil(50 * math.sqrt(len(lives))), tokens + end)


def _to_come(
    lengths: AnswerLengths, answered: int, left: int, due: int = 0, max_tokens: int = 1000
) -> tuple[float, float]:
    life = _life(answered, left, due, max_tokens)
    return tuple(round(value, 6) for value in lengths.one_to_come(life))


def test_outputs_are_as_long_as_the_last_ones_that_were_longer() -> None:
    lengths = AnswerLengths(prior_tokens=100, remembered=3)
    assert _to_come(lengths, 30, left=1000) == (70, 0)
    assert _to_come(lengths, 0, left=60) == (60, 0)
    for tokens in (10, 20, 60):
        lengths.note(1000, tokens)
    assert _to_come(lengths, 0, left=1000)[0] == 30
    assert _to_come(lengths, 15, left=1000) == (25, 20)
    # What the limit cuts is not uncertain any more.
    assert _to_come(lengths, 15, left=5) == (5, 0)
    # Nor can what is left of it bring more than that.
    assert _to_come(lengths, 0, left=12) == (11.333333, 0.666667)
    # One that has outlived all the others goes on for as long again.
    assert _to_come(lengths, 80, left=1000) == (80, 0)


def test_what_is_assumed_first_counts_among_the_lengths_that_were_seen() -> None:
    lengths = AnswerLengths(prior_tokens=512)
    lengths.note(1000, 8)
    assert _to_come(lengths, 0, left=1000)[0] == 260


def test_answers_of_one_token_are_no_evidence_of_long_ones() -> None:
    lengths = AnswerLengths(prior_tokens=512)
    for _ in range(100):
        lengths.note(1, 1)
        lengths.note(8, 8)
    assert _to_come(lengths, 0, left=1000) == (512, 0)
    assert _to_come(lengths, 0, left=8, max_tokens=8)[0] == 8
    assert _to_come(lengths, 0, left=1000, max_tokens=1)[0] == 1


def test_a_length_that_a_request_sets_is_taken_as_certain() -> None:
    lengths = AnswerLengths(prior_tokens=10)
    certain = _life(answered=0, left=700, due=700, max_tokens=700)
    at_least = _life(answered=0, left=700, due=300, max_tokens=700)
    assert lengths.one_to_come(certain) == (700, 0)
    assert lengths.one_to_come(at_least)[0] == 300


def test_each_answer_is_expected_by_its_own_class() -> None:
    lengths = AnswerLengths(prior_tokens=10)
    lengths.note(100, 90)
    short = _life(0, left=100, due=0, max_tokens=100)
    long = _life(0, left=1000, due=0, max_tokens=1000)
    # Both grow to the tenth step, and one on to the fiftieth, give or take forty.
    assert _lives([short, long], lengths).peak_room() == 50 + 40


@given(st.lists(st.integers(1, 600), max_size=80), st.data())
def test_many_answers_are_expected_as_each_is(ended: list[int], data: st.DataObject) -> None:
    lengths = AnswerLengths(prior_tokens=100)
    for tokens in ended:
        lengths.note(data.draw(st.sampled_from([100, 1000])), tokens)
    tokens = st.integers(0, 500)
    answers = st.builds(_life, tokens, tokens, tokens, st.sampled_from([100, 1000]))
    lives = data.draw(st.lists(answers, min_size=1, max_size=6))
    columns = np.array([(*life[:-1], life.max_tokens.bit_length()) for life in lives], float).T
    expected = np.array(lengths.to_come(*columns[3:]))
    each = np.array([lengths.one_to_come(life) for life in lives]).T
    np.testing.assert_allclose(expected, each, atol=1e-5)


@given(st.data())
def test_lives_go_on_by_themselves(data: st.DataObject) -> None:
    table, known = LifeTable(), {}
    lengths = AnswerLengths(prior_tokens=10)
    for step in range(data.draw(st.integers(1, 40))):
        name = data.draw(st.sampled_from("abcdefghijklmnopqrstuvwxyz"))
        if data.draw(st.booleans()):
            room, to_come = data.draw(st.integers(1, 50)), data.draw(st.integers(0, 300))
            life = _sure(room, to_come, per_token=data.draw(RATES))
            table.put(name, life, step)
            known[name] = (life, step)
        else:
            table.drop(name)
            known.pop(name, None)
        now = [
            life._replace(room=life.room + passed * life.per_token, left=life.left - passed,
                          due=life.due - passed)
            for life, since in known.values()
            for passed in [min(step - since, life.left)]
        ]  # fmt: skip
        assert len(table) == len(known)
        assert table.lives(lengths, step).peak_room() == _lives(now, lengths).peak_room()


@pytest.mark.parametrize("own_steps", [1, 5, 100])
def test_a_request_waits_no_longer_than_it_would_run(own_steps: int) -> None:
    holds, waited = Holds(), 0
    while True:
        waits = holds.known("r")
        if waits is None:
            waits = holds.decide("r", fits=False, own_steps=own_steps)
        if not waits:
            break
        waited += 1
        holds.next_step()
    assert waited == own_steps


def test_a_decision_is_made_anew_when_something_has_ended() -> None:
    holds = Holds()
    assert holds.decide("r", fits=False, own_steps=100)
    assert holds.known("r")
    holds.changed("other")
    assert holds.known("r") is None
    assert not holds.decide("r", fits=True, own_steps=100)
