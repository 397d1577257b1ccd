"""The scaling arithmetic, and the policy class that Serve calls."""

from types import SimpleNamespace
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adakv_serve.router.autoscaling import FleetSize, ReplicaDemand, ScalingTargets
from adakv_serve.serving.autoscaling import OccupancyPolicy

TARGETS = ScalingTargets(target_occupancy=0.8, target_wait_s=5, keep_s=100, decode_tokens_per_s=240)


def replica(**changes: float) -> ReplicaDemand:
    return ReplicaDemand(**{"blocks_total": 100, "requests": 4, **changes})


def desired(
    *replicas: ReplicaDemand, target: int = 2, ongoing: float = 4, queued: float = 0
) -> int:
    """Return the size after the same look for longer than a fleet keeps what it needed."""
    size = FleetSize(TARGETS)
    size.wanted(replicas, target, ongoing, queued, 0.0)
    return size.wanted(replicas, target, ongoing, queued, TARGETS.keep_s + 1)


def test_it_has_what_it_needs_at_the_target_occupancy() -> None:
    assert desired(replica(held_blocks=80), replica(held_blocks=80)) == 2
    assert desired(replica(held_blocks=81), replica(held_blocks=80)) == 3
    # 360 blocks fill 4.5 replicas to 80 %.
    assert desired(*[replica(held_blocks=90)] * 4, target=4) == 5
    assert desired(*[replica(held_blocks=25)] * 8, target=8) == 3


def test_growth_and_waiting_count_before_they_are_held() -> None:
    assert desired(replica(held_blocks=50, growth_blocks=45), replica(held_blocks=70)) == 3
    assert desired(replica(held_blocks=50, waiting_blocks=45), replica(held_blocks=70)) == 3


def test_queued_requests_count_by_the_mean_footprint() -> None:
    busy = [replica(held_blocks=60, requests=4), replica(held_blocks=60, requests=4)]
    assert desired(*busy, ongoing=8) == 2
    assert desired(*busy, ongoing=14, queued=6) == 3


def test_a_queued_request_counts_by_the_prior_while_none_runs() -> None:
    # 20 requests of 16 blocks: 3.2 replicas' worth of blocks.
    idle = [replica(requests=0)] * 2
    assert desired(*idle, target=2, ongoing=20, queued=20) == 4
    assert desired(*idle, target=2, ongoing=5, queued=5) == 1


@pytest.mark.parametrize(
    ("speeds", "size"),
    [
        # Half of the time for prompts, and half for answers.
        ({"prefill_tokens_per_s": 250, "decode_tokens_per_s": 120}, 3),
        ({"prefill_tokens_per_s": 150, "decode_tokens_per_s": 120}, 2),
        ({"prefill_tokens_per_s": 500}, 3),
        ({}, 1),
    ],
)
def test_replicas_that_compute_all_the_time_get_company_whatever_memory_is_free(
    speeds: dict[str, float], size: int
) -> None:
    assert desired(*[replica(held_blocks=5, **speeds)] * 2, target=2) == size


def test_a_backlog_scales_up_once_a_new_request_would_wait_too_long() -> None:
    in_time = replica(held_blocks=5, prefill_tokens_queued=5 * 500)
    assert desired(in_time, in_time, target=2) == 1
    late = replica(held_blocks=5, prefill_tokens_queued=5 * 500 * 3)
    assert desired(late, replica(), target=2) == 3
    # Nobody waits for a prompt that is alone.
    alone = replica(held_blocks=5, requests=1, prefill_tokens_queued=5 * 500 * 3)
    assert desired(alone, replica(), target=2) == 1
    # Queued requests' prompts are as long as the others'.
    assert desired(in_time, in_time, target=2, ongoing=16, queued=8) == 4


def test_it_never_more_than_doubles_at_once() -> None:
    assert desired(replica(held_blocks=100, waiting_blocks=900), target=1) == 2


def test_one_long_prompt_makes_no_trend_but_a_full_fleet_grows_at_once() -> None:
    size = FleetSize(TARGETS)
    for second in range(20):
        assert size.wanted([replica(held_blocks=40)] * 2, 2, 4, 0, float(second)) <= 2
    # For a moment 95 % is in use, on average 45 %.
    assert size.wanted([replica(held_blocks=95)] * 2, 2, 4, 0, 20.0) == 2
    # Whoever comes now waits for memory.
    assert size.wanted([replica(held_blocks=95, waiting_blocks=10)] * 2, 2, 4, 0, 21.0) == 3


def test_what_was_needed_of_late_stays() -> None:
    size = FleetSize(TARGETS)
    assert size.wanted([replica(held_blocks=80)] * 4, 4, 8, 0, 0.0) == 4
    for second in range(30, 100, 10):
        assert size.wanted([replica(held_blocks=20)] * 4, 4, 2, 0, float(second)) == 4
    assert size.wanted([replica(held_blocks=20)] * 4, 4, 2, 0, 131.0) == 1


def test_a_new_policy_keeps_the_fleet_that_it_finds_for_a_while() -> None:
    size = FleetSize(TARGETS)
    assert size.wanted([replica(held_blocks=20)] * 4, 4, 2, 0, 0.0) == 4
    assert size.wanted([replica(held_blocks=20)] * 4, 4, 2, 0, 101.0) == 1


def test_one_stays_while_anything_is_held_or_waits() -> None:
    assert desired(replica(held_blocks=1), target=1) == 1
    assert desired(replica(waiting_blocks=5), target=1, ongoing=0) == 1


def test_to_zero_and_back() -> None:
    size = FleetSize(TARGETS)
    assert size.wanted([replica(held_blocks=10)], 1, 1, 0, 0.0) == 1
    assert size.wanted([replica()], 1, 0, 0, 90.0) == 1
    assert size.wanted([replica()], 1, 0, 0, 101.0) == 0
    assert size.wanted([], 0, 0, 0, 102.0) == 0
    assert size.wanted([], 0, 1, 1, 103.0) == 1


def test_without_reports_the_target_holds() -> None:
    assert desired(target=3, ongoing=5) == 3


@given(
    held=st.lists(st.floats(0, 100), min_size=1, max_size=8),
    ongoing=st.floats(1, 100),
)
def test_a_second_look_at_the_same_demand_does_not_turn_back(
    held: list[float], ongoing: float
) -> None:
    target = len(held)
    first = desired(*(replica(held_blocks=h) for h in held), target=target, ongoing=ongoing)
    # The same caches, spread evenly over what was asked for.
    spread = [replica(held_blocks=sum(held) / first)] * first
    second = desired(*spread, target=first, ongoing=ongoing)
    assert (first - target) * (second - first) >= 0


def context(**changes: Any) -> SimpleNamespace:
    fields = {
        "aggregated_metrics": {},
        "target_num_replicas": 1,
        "total_num_requests": 3.0,
        "total_queued_requests": 0.0,
    }
    return SimpleNamespace(**{**fields, **changes})


def test_the_policy_reads_serves_metrics() -> None:
    metrics = {
        "blocks_total": {"a": 100.0, "b": 100.0},
        "held_blocks": {"a": 95.0, "b": 90.0},
        "requests": {"a": 3.0, "b": 3.0},
    }
    wanted, state = OccupancyPolicy()(context(aggregated_metrics=metrics, target_num_replicas=2))
    assert wanted == 3
    assert state == {}
    assert OccupancyPolicy()(context(aggregated_metrics=None))[0] == 1


@pytest.mark.parametrize(
    "targets",
    [
        {"target_occupancy": 1.5},
        {"unknown": 1},
        {"target_wait_s": 0},
        {"keep_s": -1},
        {"keep_s": float("inf")},
    ],
)
def test_impossible_targets_are_refused(targets: dict[str, float]) -> None:
    with pytest.raises(pydantic.ValidationError):
        OccupancyPolicy(**targets)
