"""A day of a fleet that grows and shrinks, in virtual time."""

import json
from pathlib import Path

import pytest

from adakv_serve.router.simulate.day import POLICIES, Day, load, main, run_day
from adakv_serve.router.simulate.replica import ServiceTimes
from adakv_serve.router.simulate.scaling import ByQueueLength, Delayed, FleetState, by_requests

TIMES = ServiceTimes(545, 491.0, 0.03389, 0.00242)
DAY = Day(TIMES, 4, start_s=5.0, goal_s=5.0, seed=0, hour_s=60.0)


def test_a_day_follows_office_hours_and_crowds() -> None:
    assert load(10.0) == 1.0
    assert load(3.0) == 0.0
    assert load(11.25) > 2.4
    requests = DAY.requests()
    assert requests == DAY.requests()
    by_hour = [0] * 24
    for request in requests:
        by_hour[int(request.arrival_s // 60)] += 1
    assert by_hour[3] < by_hour[8] < by_hour[11]


@pytest.mark.parametrize("name", list(POLICIES))
def test_every_policy_answers_every_request(name: str) -> None:
    requests = DAY.requests()
    result = run_day(name, POLICIES[name](DAY, requests), DAY, requests)
    assert 0 < result.in_goal <= 1
    assert result.replica_hours > 0
    assert result.most_replicas >= 1


def test_ours_costs_less_than_a_fixed_number_of_requests_for_each_replica() -> None:
    requests = DAY.requests()
    ours, theirs = (
        run_day(name, POLICIES[name](DAY, requests), DAY, requests) for name in ("ours", "serve_2")
    )
    assert ours.replica_hours < theirs.replica_hours


def state(target: int, waiting: int = 0, queued: int = 0) -> FleetState:
    return FleetState([], waiting, queued, target)


def test_a_decision_counts_when_it_has_lasted() -> None:
    wishes = iter([2, 2, 2, 1, 2, 2, 2, 0])
    policy = Delayed(lambda state, now_s: next(wishes), up_s=2.0, down_s=0.0)
    assert [policy.wanted(state(1), float(second)) for second in range(8)] == [
        1, 1, 2, 1, 1, 1, 2, 0,
    ]  # fmt: skip


def test_serves_policy_divides_the_mean_of_ongoing_requests() -> None:
    policy = by_requests(2, up_s=0, down_s=0, look_back_s=2)
    assert policy.wanted(state(1, queued=2), 0.0) == 1
    assert policy.wanted(state(1, queued=10), 1.0) == 3
    assert policy.wanted(state(0), 2.0) == 0


def test_the_queue_length_counts_every_fifteen_seconds() -> None:
    policy = ByQueueLength(2)
    assert policy.wanted(state(1, waiting=8), 14.0) == 1
    assert policy.wanted(state(1, waiting=8), 15.0) == 4
    assert policy.wanted(state(2, waiting=100), 30.0) == 6
    # It shrinks to the most that it has wanted of late.
    assert policy.wanted(state(6), 45.0) == 6


def test_the_command_prints_a_line_for_each_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "day.json"
    assert (
        main(["--policies", "ours", "--hour-s", "10", "--replicas", "2", "--json", str(path)]) == 0
    )
    assert "replica-hours" in capsys.readouterr().out
    (result,) = json.loads(path.read_text())
    assert result["policy"] == "ours"
