"""The simulation: it loses nothing, repeats itself, and its command writes its figures."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_serve.router.footprint import Budget
from adakv_serve.router.simulate.__main__ import main
from adakv_serve.router.simulate.fleet import capacity_per_s, simulate
from adakv_serve.router.simulate.replica import ServiceTimes, SimulatedReplica
from adakv_serve.router.simulate.routers import ROUTERS, make_router
from adakv_serve.router.simulate.traces import SCENARIOS, trace

TIMES = ServiceTimes(545, 600.0, 0.03, 0.004)
BUDGET = Budget(256, 0.5)


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_trace_is_seeded_and_in_order(name: str) -> None:
    requests = trace(name, 100, 2.0, seed=3)
    assert requests == trace(name, 100, 2.0, seed=3)
    assert requests != trace(name, 100, 2.0, seed=4)
    assert [r.arrival_s for r in requests] == sorted(r.arrival_s for r in requests)
    assert all(len(r.block_hashes) == r.prompt_tokens // 32 for r in requests)


def test_a_conversations_turns_share_their_history() -> None:
    blocks = [r.block_hashes for r in trace("multi_turn", 100, 2.0, seed=1)]
    shared = [a for a in blocks for b in blocks if a is not b and a == b[: len(a)]]
    assert len(shared) > 30


@settings(max_examples=25, deadline=None)
@given(
    router=st.sampled_from(ROUTERS),
    name=st.sampled_from(list(SCENARIOS)),
    blocks=st.integers(260, 600),
    rate=st.floats(0.1, 20),
    seed=st.integers(0, 100),
)
def test_every_request_ends_and_every_block_comes_back(
    router: str, name: str, blocks: int, rate: float, seed: int
) -> None:
    times = TIMES._replace(blocks_total=blocks)
    requests = trace(name, 60, rate, seed)
    scenario = SCENARIOS[name]
    result = simulate(router, requests, 3, times, BUDGET, seed, scenario)
    assert len(result.waits_s) == 60
    assert result.waits_s == sorted(result.waits_s)
    assert result.elapsed_s >= requests[-1].arrival_s
    # Dynamo's selection draws among equals.
    if router != "dynamo":
        assert result == simulate(router, requests, 3, times, BUDGET, seed, scenario)


@pytest.mark.parametrize("name", ["power_of_two", "least_queue", "least_occupancy", "ours"])
def test_routers_avoid_a_busy_replica(name: str) -> None:
    fleet = [SimulatedReplica(f"r{index}", TIMES, BUDGET) for index in range(2)]
    router = make_router(name, fleet, random.Random(0), TIMES, BUDGET)
    first, second, third = trace("poisson", 3, 2.0, seed=0)
    for _ in range(2):
        fleet[0].add(first, 0.0)
    router.report(0, 0.0)
    assert router.choose(second, 1.0) == 1
    fleet[1].add(second, 1.0)
    for _ in range(4):
        fleet[1].add(third, 1.0)
    router.report(1, 1.0)
    assert router.choose(third, 2.0) == 0


@pytest.mark.parametrize("router", ROUTERS)
def test_a_replica_that_joins_gets_requests(router: str) -> None:
    requests = trace("joins_cold", 60, 3.0, seed=0)
    alone = simulate(router, requests, 1, TIMES, BUDGET, 0, SCENARIOS["multi_turn"])
    joined = simulate(router, requests, 2, TIMES, BUDGET, 0, SCENARIOS["joins_cold"])
    assert joined.elapsed_s < alone.elapsed_s


def test_round_robin_takes_turns() -> None:
    fleet = [SimulatedReplica(f"r{index}", TIMES, BUDGET) for index in range(3)]
    router = make_router("round_robin", fleet, random.Random(0), TIMES, BUDGET)
    (request,) = trace("poisson", 1, 2.0, seed=0)
    assert [router.choose(request, 0.0) for _ in range(5)] == [0, 1, 2, 0, 1]


def test_little_memory_preempts_and_compression_helps() -> None:
    requests = trace("poisson", 80, 2.0, seed=0)
    tight = TIMES._replace(blocks_total=120)
    with_it = simulate("least_queue", requests, 2, tight, BUDGET, 0)
    without = simulate("least_queue", requests, 2, tight, None, 0)
    assert without.preemptions > with_it.preemptions
    assert capacity_per_s(requests, tight, BUDGET) > capacity_per_s(requests, tight, None)


def test_the_command_writes_its_figures(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "figures.json"
    arguments = ["--traces", "long_tail", "--loads", "85", "--replicas", "2", "--seeds", "1"]
    assert main([*arguments, "--json", str(path), "--plot", str(tmp_path / "plot.png")]) == 0
    row = json.loads(path.read_text())["traces"]["long_tail@85"]["replicas"]["2"]
    assert set(row) == set(ROUTERS)
    assert set(row["ours"]) == {"wait_p50_s", "wait_p99_s", "preemptions"}
    assert "long_tail@85, 2 replicas" in capsys.readouterr().out
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_it_runs_as_a_command() -> None:
    arguments = ["--traces", "poisson", "--loads", "60", "--replicas", "2", "--seeds", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "adakv_serve.router.simulate", *arguments],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "poisson@60, 2 replicas" in done.stdout


def test_a_fleet_of_one_is_refused(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--replicas", "1"])
    assert stop.value.code == 2
    assert "replicas start at 2" in capsys.readouterr().err
