"""What running requests will still take, against a step-by-step count."""

from hypothesis import given
from hypothesis import strategies as st

from adakv_worker.admission import Life, OutputLengths, peak_tokens

LIVES = st.lists(st.builds(Life, st.integers(1, 50), st.integers(0, 300)), max_size=12)


@given(LIVES)
def test_the_peak_is_the_most_that_they_ever_hold_together(lives: list[Life]) -> None:
    held = [
        sum(life.tokens + step for life in lives if life.tokens_to_come >= step)
        for step in range(301)
    ]
    assert peak_tokens(lives) == max(held)


def test_outputs_are_as_long_as_the_last_ones_that_were_longer() -> None:
    lengths = OutputLengths(prior_tokens=100, remembered=3)
    assert lengths.to_come(30, limit=1000) == 70
    assert lengths.to_come(0, limit=60) == 60
    for tokens in (999, 10, 20, 60):
        lengths.note(tokens)
    assert lengths.to_come(0, limit=1000) == 30
    assert lengths.to_come(15, limit=1000) == 25
    assert lengths.to_come(80, limit=1000) == 80
