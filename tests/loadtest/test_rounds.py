"""Where the time of a round of requests went."""

import pytest

from adakv_serve.loadtest.engines.rounds import Compression, Step, step_figures


def test_decodes_in_a_step_with_prefills_cost_what_they_cost_alone() -> None:
    steps = [Step(1.0, 500, 0), Step(1.3, 500, 3), Step(0.4, 0, 4), Step(0.2, 0, 2)]
    figures = step_figures(steps, Compression())
    # A decode alone takes 0.1 s.
    assert figures["prefill_s"] == pytest.approx(2.0)
    assert figures["decode_s"] == pytest.approx(0.9)
    assert figures["decode_tokens_per_s"] == pytest.approx(4 / 0.4)
    assert (figures["compress_share"], figures["prepare_share"]) == (0, 0)


def test_compression_is_not_prefill() -> None:
    steps = [Step(2.0, 500, 0), Step(0.5, 0, 1)]
    figures = step_figures(steps, Compression(0.4, 0.1, 0.05, 1000))
    assert figures["prefill_s"] == pytest.approx(1.6)
    assert figures["compress_share"] == pytest.approx(0.25)
    assert figures["prepare_share"] == pytest.approx(0.1)
    assert (figures["compress_s"], figures["evict_s"], figures["extra_bytes"]) == (0.4, 0.1, 1000)


def test_the_rate_at_the_peak_is_of_the_largest_batches() -> None:
    steps = [Step(1.0, 0, 100), Step(1.0, 0, 95), Step(9.0, 0, 94), Step(1.0, 8, 100)]
    assert step_figures(steps, Compression())["decode_tokens_per_s"] == pytest.approx(97.5)


def test_a_request_that_is_computed_again_is_a_prefill() -> None:
    assert Step.of(1.0, 0, 3, 3) == Step(1.0, 0, 3)
    assert Step.of(1.0, 7, 3, 300) == Step(1.0, 307, 0)


def test_a_round_without_steps_has_no_rate() -> None:
    assert step_figures([], Compression())["decode_tokens_per_s"] == 0
