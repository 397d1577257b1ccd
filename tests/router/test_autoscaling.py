"""The scaling arithmetic, and the policy class that Serve calls."""

from types import SimpleNamespace
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.autoscaling import ReplicaDemand, ScalingTargets, desired_replicas
from serving.autoscaling import OccupancyPolicy

TARGETS = ScalingTargets(low_occupancy=0.3, high_occupancy=0.8, target_wait_s=5)


def replica(**changes: float) -> ReplicaDemand:
    return ReplicaDemand(**{"blocks_total": 100, "requests": 4, **changes})


def desired(
    *replicas: ReplicaDemand, target: int = 2, ongoing: float = 4, queued: float = 0
) -> int:
    return desired_replicas(replicas, target, ongoing, queued, TARGETS)


def test_inside_the_band_nothing_moves() -> None:
    assert desired(replica(held_blocks=50), replica(held_blocks=40)) == 2


@pytest.mark.parametrize("held", [30, 80])
def test_the_ends_of_the_band_belong_to_it(held: float) -> None:
    assert desired(*[replica(held_blocks=held)] * 4, target=4) == 4


def test_it_grows_and_shrinks_to_the_middle_of_the_band() -> None:
    # 4 replicas with 90 blocks each need 6.5 of them at 55 %.
    assert desired(*[replica(held_blocks=90)] * 4, target=4) == 7
    assert desired(*[replica(held_blocks=25)] * 8, target=8) == 4


def test_a_backlog_that_all_replicas_can_work_off_in_time_scales_nothing() -> None:
    backlog = [replica(held_blocks=50, prefill_tokens_queued=5 * 500)] * 2
    assert desired(*backlog) == 2
    # Nor does it shrink below what the backlog needs.
    assert desired(*[replica(prefill_tokens_queued=5 * 500)] * 4, target=4) == 4


def test_waiting_requests_alone_keep_a_replica() -> None:
    assert desired(replica(waiting_blocks=5), target=1, ongoing=0) == 1
    assert desired(replica(held_blocks=5, waiting_blocks=5), target=1, ongoing=0) == 1


def test_a_queued_request_counts_by_the_prior_while_none_runs() -> None:
    # 20 requests of 16 blocks: 3.2 replicas' worth of blocks.
    idle = [replica(requests=0)] * 2
    assert desired(*idle, target=2, ongoing=20, queued=20) == 4
    assert desired(*idle, target=2, ongoing=5, queued=5) == 2


def test_growth_and_waiting_count_before_they_are_held() -> None:
    assert desired(replica(held_blocks=50, growth_blocks=45), replica(held_blocks=70)) == 3
    assert desired(replica(held_blocks=50, waiting_blocks=45), replica(held_blocks=70)) == 3


def test_queued_requests_count_by_the_mean_footprint() -> None:
    busy = [replica(held_blocks=60, requests=4), replica(held_blocks=60, requests=4)]
    assert desired(*busy, ongoing=8) == 2
    assert desired(*busy, ongoing=14, queued=6) == 4


def test_a_prefill_backlog_scales_up_with_all_memory_free() -> None:
    backlog = replica(held_blocks=5, prefill_tokens_queued=5 * 500 * 3)
    assert desired(backlog, replica(held_blocks=0), target=2) == 3


def test_it_never_more_than_doubles_at_once() -> None:
    assert desired(replica(held_blocks=100, waiting_blocks=900), target=1) == 2


def test_it_shrinks_only_as_far_as_the_held_caches_fit() -> None:
    assert desired(*[replica(held_blocks=20)] * 4, target=4) == 2
    assert desired(*[replica(held_blocks=1)] * 4, target=4) == 1


def test_one_stays_while_anything_is_held() -> None:
    assert desired(replica(held_blocks=1), target=1) == 1


def test_to_zero_and_back() -> None:
    assert desired(replica(held_blocks=0), target=1, ongoing=0) == 0
    assert desired(target=0, ongoing=0) == 0
    assert desired(target=0, ongoing=1) == 1


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
    assert wanted == 4
    assert state == {}
    assert OccupancyPolicy()(context(aggregated_metrics=None))[0] == 1


@pytest.mark.parametrize(
    "targets",
    [{"low_occupancy": 0.9}, {"high_occupancy": 1.5}, {"unknown": 1}, {"target_wait_s": 0}],
)
def test_impossible_targets_are_refused(targets: dict[str, float]) -> None:
    with pytest.raises(pydantic.ValidationError):
        OccupancyPolicy(**targets)
