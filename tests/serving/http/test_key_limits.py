"""Limits of API keys over time, against a simple count of what was let through."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.serving.http.key_limits import Admission, KeyLimits, LimitReached, Limits
from tests.serving.http.scripted_backend import Clock


def limits(clock: Clock | None = None, doors: int = 1, **usual: Any) -> KeyLimits:
    return KeyLimits(Limits(**usual), {"big": Limits()}, lambda: doors, clock or Clock())


def admitted_or_wait_s(keys: KeyLimits) -> Admission | float:
    """Return a request's admission, or the time after which it may be sent."""
    try:
        return keys.admit("a")
    except LimitReached as reached:
        return float(reached.retry_after_s or 0)


def test_requests_at_once_end_and_make_room() -> None:
    keys = limits(requests_at_once=2)
    first, _ = keys.admit("a"), keys.admit("a")
    with pytest.raises(LimitReached, match="2 requests in progress") as reached:
        keys.admit("a")
    assert reached.value.retry_after_s is None
    keys.admit("b")
    first.end()
    keys.admit("a")
    for _ in range(5):
        keys.admit("big")


def test_a_key_has_its_share_of_the_fleets_places_and_leaves_the_others() -> None:
    keys = KeyLimits(Limits(share_at_once=0.25), {"big": Limits(share_at_once=0.75)}, places=16)
    for _ in range(4):
        keys.admit("a")
    for _ in range(12):
        keys.admit("big")
    for name, most in (("a", 4), ("big", 12)):
        with pytest.raises(LimitReached, match=f"{most} requests in progress"):
            keys.admit(name)


@given(st.integers(1, 9), st.floats(0.01, 1), st.integers(1, 300), st.integers(1, 4))
def test_of_two_limits_at_once_the_lower_one_holds_and_each_door_takes_one(
    at_once: int, share: float, places: int, doors: int
) -> None:
    both = Limits(requests_at_once=at_once, share_at_once=share)
    keys = KeyLimits(both, {}, lambda: doors, Clock(), places)
    answers = [admitted_or_wait_s(keys) for _ in range(at_once + 1)]
    admitted = sum(isinstance(answer, Admission) for answer in answers)
    assert admitted == 1 or admitted * doors <= min(at_once, share * places)


def test_doors_share_a_limit() -> None:
    keys = limits(doors=2, requests_at_once=4, requests_per_minute=60)
    admitted = [keys.admit("a") for _ in range(2)]
    with pytest.raises(LimitReached, match="in progress"):
        keys.admit("a")
    for one in admitted:
        one.end()
    for _ in range(28):
        keys.admit("a").end()
    with pytest.raises(LimitReached, match="requests per minute"):
        keys.admit("a")


def test_a_limit_below_the_number_of_doors_lets_some_through() -> None:
    clock = Clock()
    keys = limits(clock, doors=8, requests_per_minute=2, requests_at_once=1)
    keys.admit("a").end()
    with pytest.raises(LimitReached) as reached:
        keys.admit("a")
    assert reached.value.retry_after_s is not None
    clock.now += reached.value.retry_after_s
    keys.admit("a")


@given(
    steps=st.lists(st.tuples(st.floats(0, 30), st.integers(0, 200)), min_size=1, max_size=60),
    requests=st.integers(1, 20),
    tokens=st.integers(1, 500),
)
def test_no_minute_has_more_than_a_limit_beyond_its_burst(
    steps: list[tuple[float, int]], requests: int, tokens: int
) -> None:
    clock = Clock()
    keys = limits(clock, requests_per_minute=requests, tokens_per_minute=tokens)
    began, admitted, paid = clock.now, 0, 0
    for pause_s, cost in steps:
        clock.now += pause_s
        minutes = (clock.now - began) / 60
        admission = admitted_or_wait_s(keys)
        if isinstance(admission, float):
            assert admission > 0
            continue
        # What was there at first, and what has come since; tokens may be owed by one request.
        admitted += 1
        assert admitted <= requests * (1 + minutes) + 1e-6
        assert paid <= tokens * (1 + minutes) + 1e-6
        admission.pay(cost)
        paid += cost


@given(tokens=st.integers(1, 500), cost=st.integers(1, 5_000))
def test_after_the_told_time_a_key_may_send_again(tokens: int, cost: int) -> None:
    clock = Clock()
    keys = limits(clock, tokens_per_minute=tokens)
    keys.admit("a").pay(cost)
    wait_s = admitted_or_wait_s(keys)
    if isinstance(wait_s, float):
        clock.now += wait_s + 1e-6
        keys.admit("a")
    else:
        assert cost < tokens


def test_keys_without_limits_leave_nothing_behind() -> None:
    keys = limits()
    admissions = [keys.admit(f"token-{number}") for number in range(50)]
    again = keys.admit("token-0")
    for admission in admissions:
        admission.end()
    assert set(keys._used) == {"token-0"}
    again.end()
    assert not keys._used


def test_a_key_at_rest_keeps_what_it_has_used_up() -> None:
    keys = limits(requests_per_minute=1)
    keys.admit("a").end()
    with pytest.raises(LimitReached):
        keys.admit("a")
