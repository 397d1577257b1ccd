"""Replicas that die and replicas whose code fails, told apart by a front door on Ray Serve."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve
from ray.serve.schema import ReplicaState

from adakv_serve.serving.app import ingress_options
from adakv_serve.serving.config import AppConfig
from tests.system.deployment import ROOT
from tests.system.small_engine import FAULTS, SECRET, Answered, application
from tests.waiting import eventually

pytestmark = pytest.mark.slow

Ask = Callable[..., tuple[Answered, int]]


@pytest.fixture(scope="module")
def handle() -> Iterator[Any]:
    runtime_env = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(
        address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
        object_store_memory=100 << 20, runtime_env=runtime_env,
    )  # fmt: skip
    serve.start(proxy_location="Disabled")
    yield serve.run(application(ingress_options(AppConfig())), route_prefix=None)
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def ask(handle: Any, tmp_path: Path) -> Ask:
    """Return what asks once, and returns the answer and the number of calls of replicas."""

    def both_run() -> bool:
        states = serve.status().applications["default"].deployments["Engine"].replica_states
        return states == {ReplicaState.RUNNING: 2}

    eventually(both_run, 60, "both replicas")
    calls = tmp_path / "calls"

    def ask(*steps: str) -> tuple[Answered, int]:
        answered = handle.ask.remote({"calls": str(calls), "steps": steps}).result(timeout_s=60)
        return answered, len(calls.read_text().split())

    return ask


@pytest.mark.parametrize("step", ["die", "cancel"])
def test_a_lost_request_is_answered_by_another_replica(ask: Ask, step: str) -> None:
    answered, calls = ask(step, "answer")
    assert (answered.status, calls) == (200, 2), answered
    assert "request_id=asked retrying" in answered.log


def test_a_request_that_kills_replicas_is_sent_once_more_only(ask: Ask) -> None:
    answered, calls = ask("die")
    assert (answered.status, calls) == (503, 2), answered
    assert json.loads(answered.text)["error"]["type"] == "ReplicaLost"


@pytest.mark.parametrize("step", ["die", "cancel"])
def test_a_stream_that_has_begun_ends_with_the_loss(ask: Ask, step: str) -> None:
    answered, calls = ask(f"stream, {step}")
    assert calls == 1
    first, last = answered.text.strip().split("\n\n")
    assert first == "data: 1"
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("ReplicaLost", 503), answered


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_a_500_and_its_traceback_is_in_the_log(ask: Ask, fault: str) -> None:
    answered, calls = ask(fault)
    assert (answered.status, calls) == (500, 1), answered
    assert SECRET not in answered.text
    assert "request_id=asked failed" in answered.log
    assert "in _the_engines_code" in answered.log
    assert SECRET in answered.log


def test_a_fault_in_a_stream_ends_it_with_an_internal_error(ask: Ask) -> None:
    answered, calls = ask("stream, runtime")
    assert calls == 1
    error = json.loads(answered.text.strip().split("\n\n")[-1].removeprefix("data: "))["error"]
    assert (error["type"], error["code"]) == ("InternalServerError", 500), answered
    assert "in _the_engines_code" in answered.log
