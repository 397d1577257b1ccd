from pathlib import Path
from typing import Any

import pytest
import yaml

from adakv_serve.loadtest.routing import (
    ARMS,
    Mix,
    Planned,
    Round,
    avoidable,
    deployment,
    plan,
    report,
    round_figures,
    run_round,
    summary,
)
from adakv_serve.loadtest.servers.occupancy import Look, OccupancyWatch
from adakv_serve.serving.config import AppConfig
from tests.loadtest.fake_client import fake_client

CONFIG = Path(__file__).parents[2] / "configs" / "cluster.yaml"
IDLE: dict[str, Any] = {
    "waiting": 0, "prefill_tokens_queued": 0, "blocks_free": 50, "blocks_reserved_growth": 0,
    "waiting_blocks": 0,
}  # fmt: skip
QUEUED = {**IDLE, "waiting": 2, "waiting_blocks": 80, "blocks_free": 0}


def test_a_plan_is_the_same_for_a_seed_and_has_both_lengths() -> None:
    mix = Mix(200, rate_per_s=2.0, long_share=0.25)
    planned = plan(mix, 3)
    assert planned == plan(mix, 3)
    assert planned != plan(mix, 4)
    assert [each.at_s for each in planned] == sorted(each.at_s for each in planned)
    assert planned[-1].at_s == pytest.approx(100, rel=0.3)
    longs = [each for each in planned if len(each.prompt) > 5000]
    assert len(longs) == pytest.approx(50, abs=25)
    assert len({each.prompt[:8] for each in planned}) == 200
    assert all(32 <= each.output_tokens < 96 for each in planned)


@pytest.mark.parametrize(
    ("loads", "expected"),
    [
        ([IDLE, IDLE], None),
        ([QUEUED, QUEUED], False),
        # Two waiting requests need 80 blocks: each of them finds its 40.
        ([QUEUED, IDLE], True),
        ([QUEUED, {**IDLE, "blocks_free": 40}], True),
        ([QUEUED, {**IDLE, "blocks_free": 39}], False),
        ([QUEUED, {**IDLE, "blocks_reserved_growth": 11}], False),
        ([QUEUED, {**IDLE, "prefill_tokens_queued": 1}], False),
        ([{**QUEUED, "waiting_blocks": None}, {**IDLE, "blocks_free": 0}], True),
    ],
)
def test_a_wait_is_avoidable_where_another_replica_has_room(
    loads: list[dict[str, Any]], expected: bool | None
) -> None:
    assert avoidable(loads) is expected


def test_the_share_of_avoidable_waits_is_of_the_samples_with_a_wait() -> None:
    looks = [Look(at, loads) for at, loads in enumerate(([IDLE], [QUEUED, IDLE], [QUEUED]))]
    figures = round_figures([0.3, 0.1, 0.2], looks, 9.0)
    assert figures == Round(0.2, 0.3, 0.5, 9.0)
    assert round_figures([1.0], [], 9.0).queued_while_room == 0


async def test_a_round_asks_for_everything_that_is_planned() -> None:
    asked: list[dict[str, Any]] = []
    planned = [Planned(0.0, "first", 5), Planned(0.01, "second", 7)]
    watch = OccupancyWatch()
    watch.looks.append(Look(0.0, [QUEUED, IDLE]))
    done = await run_round(fake_client(asked), watch, planned)
    assert [(body["prompt"], body["max_tokens"]) for body in asked] == [("first", 5), ("second", 7)]
    assert done.queued_while_room == 1
    assert done.elapsed_s >= 0.01


def test_the_report_compares_medians() -> None:
    rounds = {
        "ours": [Round(1.0, 2.0, 0.0, 9.0), Round(3.0, 6.0, 0.5, 9.0), Round(2.0, 4.0, 0.2, 9.0)],
        "power_of_two": [Round(4.0, 5.0, 0.5, 9.0)],
    }
    lines = report(summary(rounds))
    assert lines[0].startswith("ours        : TTFT p50 2.0 s, p99 4.0 s; queued while the other")
    assert lines[0].endswith("room 20%")
    assert lines[2:] == [
        "ttft_p50_s: -50% against power_of_two", "ttft_p99_s: -20% against power_of_two",
    ]  # fmt: skip


def test_the_arms_differ_in_the_router_alone() -> None:
    config = yaml.safe_load(CONFIG.read_text())
    made = [deployment(config, policy)["applications"][0]["args"] for policy in ARMS.values()]
    assert [AppConfig.model_validate(args).routing.policy for args in made] == [*ARMS.values()]
    ours, theirs = ({**args, "routing": None} for args in made)
    assert ours == theirs
