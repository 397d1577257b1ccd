import math

from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.loadtest.comparison.bound import bound

SECONDS = st.floats(0.1, 1e4)
GAINS = st.floats(1.0, 1e3)


def test_a_decode_twice_as_fast_halves_what_is_not_prefill() -> None:
    assert bound(10.0, 4.0, 2.0) == 10 / 7


def test_what_is_not_computed_takes_no_time() -> None:
    # Half of the prompts' tokens are resumed, and decoding is twice as fast.
    assert bound(10.0, 4.0, 2.0, 0.5) == 10 / 5


@given(SECONDS, st.floats(0.01, 1.0), GAINS)
def test_the_bound_lies_between_one_and_both_limits(
    total: float, share: float, gain: float
) -> None:
    found = bound(total, share * total, gain)
    most = bound(total, share * total, math.inf)
    assert 1 - 1e-9 <= found <= min(gain, most) + 1e-9
    assert math.isclose(most, 1 / share)


@given(SECONDS, GAINS)
def test_prefills_measured_above_the_total_leave_nothing_to_gain(total: float, gain: float) -> None:
    assert bound(total, 2 * total, gain) == 1
