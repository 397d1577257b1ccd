from typing import Any

from adakv_serve.loadtest.autoscaling import Phases, Sample, drive
from adakv_serve.loadtest.servers.occupancy import Look, OccupancyWatch
from tests.loadtest.fake_client import fake_client

REPLICA: dict[str, Any] = {
    "blocks_total": 100, "blocks_free": 80, "blocks_reserved_growth": 10, "running": 2,
    "waiting": 1,
}  # fmt: skip


def test_a_sample_adds_up_the_replicas_with_what_they_have_reserved() -> None:
    empty = {**REPLICA, "blocks_free": 100, "blocks_reserved_growth": 0, "running": 0}
    assert Sample.of([REPLICA, empty], 1.04) == Sample(1.0, 2, 0.15, 2, 2)
    assert Sample.of([], 0.0).occupancy == 0


def test_a_line_is_due_when_replicas_or_running_requests_change() -> None:
    sample = Sample(1.0, 2, 0.5, 3, 0)
    assert sample.differs_from(None)
    assert not sample._replace(at_s=0.5, occupancy=0.1, waiting=4).differs_from(sample)
    assert sample._replace(replicas=1).differs_from(sample)
    assert sample._replace(running=1).differs_from(sample)


def test_the_last_client_stops_when_the_fleet_is_small_again_or_time_is_up() -> None:
    phases = Phases(4, high_s=10, limit_s=30)
    assert phases.is_high(10)
    assert not phases.is_high(10.1)
    # Small because it has not grown yet.
    assert not phases.is_over(5, 1)
    assert not phases.is_over(20, None)
    assert not phases.is_over(20, 2)
    assert phases.is_over(20, 1)
    assert phases.is_over(30.1, 2)


async def test_a_drive_counts_requests_failures_and_replicas() -> None:
    asked: list[dict[str, Any]] = []
    watch = OccupancyWatch()
    watch.looks.append(Look(0.0, [REPLICA, REPLICA]))

    def grown_and_shrunk(body: dict[str, Any]) -> int:
        if len(asked) == 3:
            watch.looks.append(Look(1.0, [REPLICA]))
        return 200

    phases = Phases(1, high_s=0.0, limit_s=600)
    result = await drive(fake_client(asked, grown_and_shrunk), watch, phases, sample_s=0.001)
    assert result["requests"] == len(asked) >= 3
    assert (result["failed"], result["last_replicas"]) == ([], 1)
    assert len({body["prompt"] for body in asked}) == len(asked)
    assert result["timeline"][-1]["running"] == 2


async def test_failures_are_named() -> None:
    asked: list[dict[str, Any]] = []
    watch = OccupancyWatch()
    watch.looks.append(Look(0.0, [REPLICA]))
    phases = Phases(1, high_s=0.0, limit_s=600)
    result = await drive(fake_client(asked, lambda body: 503), watch, phases, sample_s=0.001)
    assert len(result["failed"]) == len(asked) == 1
    assert "503" in result["failed"][0]
