"""The command prints and writes a figure for every scenario; how large they are is not tested."""

import json
from pathlib import Path

import pytest

from adakv_worker.plugin import register
from adakv_worker.scheduler_bench import Scenario, Side, main, make_side


def test_every_scenario_has_figures_of_both_schedulers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--running", "8", "--waiting", "20", "--rounds", "2", "--steps", "4"]
    assert main([*arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["steps"]
    measured = [
        (row["policy"], row["waiting"], row["lacking"], row["running"], row["step"]) for row in rows
    ]
    assert measured == [
        (policy, waiting, lacking, 8, step)
        for policy, waiting, lacking in [
            ("fcfs", 0, "nothing"), ("fcfs", 20, "seats"), ("fcfs", 20, "memory"),
            ("priority", 20, "seats"), ("priority", 20, "memory"),
        ]
        for step in ("decode", "prefill")
    ]  # fmt: skip
    for row in rows:
        assert min(row["stock_steps"], row["ours_steps"]) > 1
        assert row["ratio"] == row["ours_median_ms"] / row["stock_median_ms"]
        assert row["ours_low_ms"] <= row["ours_median_ms"] <= row["ours_high_ms"]
    # A heading and a line for each row.
    assert len(capsys.readouterr().out.splitlines()) >= 1 + len(rows)


@pytest.fixture(params=[False, True], ids=["stock", "ours"])
def side(request: pytest.FixtureRequest) -> Side:
    register()
    made = make_side(Scenario("fcfs", 8), ours=request.param)
    made.fill(8)
    return made


@pytest.mark.parametrize("lacking", ["seats", "memory"])
def test_waiting_requests_begin_only_in_the_place_of_one_that_ended(
    side: Side, lacking: str
) -> None:
    side.enter(Scenario("fcfs", 8, 20, lacking))
    for _ in range(8):
        side.advance(ends=False, begins=False)
    decodes = [side.advance(ends=False, begins=False) for _ in range(8)]
    assert [step.begun for step in decodes] == [0] * 8
    assert len(side.scheduler.running) == 8
    side.advance(ends=True)
    for _ in range(24):
        side.advance(ends=True)
    prefills = [side.advance(ends=True) for _ in range(8)]
    assert sum(step.begun == 1 for step in prefills) >= 6
    assert not any(step.preempted for step in [*decodes, *prefills])
    assert len(side.scheduler.waiting) >= 19


def test_ours_compresses_what_runs() -> None:
    register()
    free = []
    for ours in (False, True):
        side = make_side(Scenario("fcfs", 8), ours=ours)
        side.fill(8)
        free.append(side.scheduler.kv_cache_manager.block_pool.get_num_free_blocks())
    # 1,500 tokens are 47 blocks, 256 entries nine.
    assert free[1] - free[0] > 8 * 30


def test_nonsense_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--running", "0"])
    assert "--running" in capsys.readouterr().err
