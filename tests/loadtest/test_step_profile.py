"""What a profile says of the GPU's time."""

from adakv_serve.loadtest.engines.step_profile import Span, busy_us


def test_spans_that_overlap_count_once() -> None:
    spans = [Span("b", 5, 8), Span("a", 0, 4), Span("inside a", 1, 2), Span("beside a", 3, 5)]
    assert busy_us(spans) == 8
    assert busy_us([Span("a", 0, 4), Span("late", 10, 11)]) == 5
    assert busy_us([]) == 0
