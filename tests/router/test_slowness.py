"""Which replicas count as slow, from what they report."""

import pytest

from adakv_serve.router.footprint import Footprint
from adakv_serve.router.ledger.occupancy import Occupancy
from adakv_serve.router.local_view import LocalView
from adakv_serve.router.score import ReplicaView, Speeds, score
from adakv_serve.router.slowness import Slowness, relative, usual_ratio
from tests.router.occupancies import occupancy

SPEEDS = Speeds(prefill_tokens_per_s=500, decode_step_s=0.03, decode_step_s_per_request=0.002)


def busy(replica_id: str, slow: float, second: int, running: int = 1) -> Occupancy:
    """Return a report of a replica that computes prompts half of the time, and decodes else."""
    token_s = 0.002 + 0.028 / max(1, running)
    return occupancy(
        replica_id, sequence=second + 1, running=running, waiting=0,
        prefill_tokens_per_s=0.5 * 500 / slow, decode_tokens_per_s=0.5 / token_s / slow,
        decode_steps_per_s=0.5 / token_s / slow / max(1, running),
    )  # fmt: skip


@pytest.mark.parametrize("slow", [0.5, 1.0, 2.5])
def test_the_ratio_is_that_of_busy_to_expected_time(slow: float) -> None:
    slowness = Slowness(SPEEDS)
    for second in range(20):
        slowness.note(busy("a", slow, second), float(second))
        assert slowness.ratio is None
    for second in range(20, 40):
        slowness.note(busy("a", slow, second), float(second))
    assert slowness.ratio == pytest.approx(slow)


def test_work_that_is_reported_after_its_end_counts() -> None:
    slowness = Slowness(SPEEDS)
    for second in range(0, 200, 2):
        # The replica computes one prompt in a second. Its next report has the prompt's tokens.
        slowness.note(
            occupancy(sequence=second, running=1, waiting=0, decode_steps_per_s=0), float(second)
        )
        done = occupancy(
            sequence=second + 1, running=0, waiting=0, prefill_tokens_per_s=500,
            decode_steps_per_s=0,
        )  # fmt: skip
        slowness.note(done, second + 1.0)
    assert slowness.ratio == pytest.approx(1.0)


def test_only_notable_differences_count() -> None:
    assert usual_ratio([1.0]) is None
    assert usual_ratio([None, 1.0]) is None
    assert usual_ratio([1.0, 2.5]) == 1.0
    assert relative(None, 1.0) == relative(2.0, None) == relative(1.4, 1.0) == 1.0
    assert relative(2.5, 1.0) == 2.5
    assert relative(300.0, 1.0) == 10.0


def test_a_replica_that_computes_nothing_is_slow() -> None:
    slowness = Slowness(SPEEDS)
    for second in range(60):
        slowness.note(occupancy(sequence=second, running=5, decode_steps_per_s=0), float(second))
    assert relative(slowness.ratio, 1.0) == 10.0


def test_a_replica_that_does_not_report_its_steps_is_not_compared() -> None:
    slowness = Slowness(SPEEDS)
    for second in range(100):
        slowness.note(occupancy(sequence=second, running=1), float(second))
    assert slowness.ratio is None


def test_a_view_has_the_slowness_of_each_replica() -> None:
    view = LocalView(ttl_s=60, speeds=SPEEDS)
    for second in range(30):
        for name, slow in (("a", 1.0), ("b", 1.0), ("c", 2.5)):
            view.accept(busy(name, slow, second), float(second))
    found = [one.slowness for one in view.views("abc", 29.0)]
    assert found == [1.0, 1.0, pytest.approx(2.5)]


def test_a_slow_replica_costs_more_even_when_it_is_empty() -> None:
    empty = ReplicaView("a", 100, 100, 0, 0, 0, 0)
    footprint = Footprint(10, 10, 500, 100)
    usual, slow = (
        score(empty._replace(slowness=times), footprint, 0, SPEEDS) for times in (1.0, 2.5)
    )
    # A second of prefill and three of decoding.
    assert slow.total_s - usual.total_s == pytest.approx(1.5 * (1 + 3))
