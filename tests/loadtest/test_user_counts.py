"""Ramps and steps of users."""

import pytest

from adakv_serve.loadtest.traffic.user_counts import Ramp, Steps


def test_a_ramp_is_a_straight_line_up_or_down_to_its_end() -> None:
    up, down = Ramp.parse("1:31:60"), Ramp.parse("8:2:30")
    assert [up.users(at) for at in (0, 20, 40, 59.9, 60, 1000)] == [1, 11, 21, 31, None, None]
    assert [down.users(at) for at in (0, 15, 29.9, 30)] == [8, 5, 2, None]


def test_steps_have_the_same_length() -> None:
    steps = Steps.parse("2,8,4:10")
    assert [steps.users(at) for at in (0, 9.9, 10, 19.9, 20, 29.9, 30)] == [2, 2, 8, 8, 4, 4, None]


@pytest.mark.parametrize("text", ["1:2", "1:2:3:4", "a:2:3", "", "1,2:3"])
def test_a_ramp_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected users at first"):
        Ramp.parse(text)


@pytest.mark.parametrize("text", ["0:2:3", "1:-2:3", "1:2:0", "1:2:nan"])
def test_a_ramp_has_positive_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Ramp.parse(text)


@pytest.mark.parametrize("text", ["1,2", "1.5:3", ":3", "1,2:3:4"])
def test_steps_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected users,users"):
        Steps.parse(text)


@pytest.mark.parametrize("text", ["0:3", "1,-2:3", "1,2:0"])
def test_steps_have_positive_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        Steps.parse(text)
