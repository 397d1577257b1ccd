"""The soak: slopes, what it samples, and what its load counts as a failure."""

import asyncio
import itertools
import json
import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from adakv_serve.loadtest.servers.family import role_of
from adakv_serve.loadtest.servers.occupancy import Look
from adakv_serve.loadtest.servers.twins import twins_config
from adakv_serve.loadtest.soak import Soaked
from adakv_serve.loadtest.soaking.load import WORKLOADS, MixedLoad, fill_by_size, mixed_sessions
from adakv_serve.loadtest.soaking.samples import LIMITS, Samples, table
from adakv_serve.loadtest.soaking.slopes import Limit, Sample, Trend, theil_sen, trend
from adakv_serve.loadtest.traffic.workloads import Session, Sizes, Turn
from adakv_serve.serving.config import AppConfig
from tests.loadtest.fake_openai import completion_lines

HOUR_S = 3600.0
LIMIT = Limit(per_hour=10, noise=4)


def line(per_hour: float, start: float = 100.0, count: int = 120) -> list[Sample]:
    """Samples over an hour."""
    times = [HOUR_S * at / (count - 1) for at in range(count)]
    return [Sample(at_s, start + per_hour * at_s / HOUR_S) for at_s in times]


@pytest.mark.parametrize("per_hour", [-30.0, 0.0, 0.5, 30.0])
def test_the_slope_of_a_line_is_its_own(per_hour: float) -> None:
    middle, least = theil_sen(line(per_hour))
    assert middle * HOUR_S == pytest.approx(per_hour, abs=1e-9)
    assert least * HOUR_S == pytest.approx(per_hour, abs=1e-9)


def test_a_quarter_of_wild_samples_moves_the_slope_little() -> None:
    rng, samples = random.Random(0), line(20.0)
    wild = [
        sample._replace(value=rng.uniform(0, 10_000)) if at % 4 == 0 else sample
        for at, sample in enumerate(samples)
    ]
    assert theil_sen(wild).middle * HOUR_S == pytest.approx(20.0, abs=5.0)


def test_too_little_has_no_slope() -> None:
    assert theil_sen([]) == theil_sen([Sample(1.0, 5.0)]) == (0.0, 0.0)
    assert theil_sen([Sample(1.0, 5.0), Sample(1.0, 9.0)]) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("per_hour", "grows"),
    # Half an hour counts: 9 an hour are below the limit, 11 are above it and above the noise.
    [(0.0, False), (9.0, False), (11.0, True), (-50.0, False)],
)
def test_a_measure_grows_above_its_limit(per_hour: float, grows: bool) -> None:
    found = trend(line(per_hour), HOUR_S, LIMIT)
    assert found is not None
    assert found.grows is grows
    assert found.per_hour == pytest.approx(per_hour, abs=1e-6)


def test_growth_within_the_noise_is_none() -> None:
    """In a minute a hundred an hour are less than two."""
    short = [Sample(at_s / 60, value) for at_s, value in line(100.0 / 60)]
    found = trend(short, 60.0, LIMIT)
    assert found is not None
    assert found.per_hour == pytest.approx(100.0)
    assert not found.grows


@pytest.mark.parametrize(("per_hour", "least", "most"), [(0.0, 0, 8), (90.0, 92, 100)])
def test_memory_that_rises_and_falls_grows_if_it_does_so_from_a_higher_level_each_time(
    per_hour: float, least: int, most: int
) -> None:
    """An engine on CPUs gives memory back every five minutes, and needs now more and now less."""
    growing = 0
    for seed in range(100):
        rng = random.Random(seed)
        needed = [rng.gauss(0.0, 20.0) for _ in range(24)]
        samples = [
            Sample(at_s, per_hour * at_s / HOUR_S + 200 * (at_s % 300) / 300 + needed[at_s // 300])
            for at_s in range(0, 7200, 21)
        ]
        found = trend(samples, 2 * HOUR_S, LIMITS["memory_mib"])
        assert found is not None
        growing += found.grows
    assert least <= growing <= most


def test_what_grows_only_in_the_first_half_does_not_grow() -> None:
    warming = [Sample(at_s, min(value, 150.0)) for at_s, value in line(100.0)]
    found = trend(warming, HOUR_S, LIMIT)
    assert found == Trend(150.0, 150.0, 0.0, 0.0, False)


def test_a_process_that_came_late_or_went_early_has_no_trend() -> None:
    samples = line(100.0)
    assert trend(samples[-40:], HOUR_S, LIMIT) is None
    assert trend(samples[:50], HOUR_S, LIMIT) is None
    assert trend(samples[:62], HOUR_S, LIMIT) is None


def test_a_growing_measure_fails_the_run_and_is_named() -> None:
    samples = Samples()
    for at in range(100):
        load = {"id": "r", "blocks_total": 100, "blocks_free": 100 - at, "waiting": 0,
                "sessions_held": 3}  # fmt: skip
        samples.add_look(at * 36.0, Look(0.0, [load], store_keys=7))
    trends = samples.trends(HOUR_S)
    assert {name for name, one in trends.items() if one.grows} == {
        ("reported by r", "blocks_used_percent")
    }
    found = Soaked(samples, trends, {"answered": 3}, {}, [])
    assert not found.is_good
    assert "GROWS: blocks_used_percent of reported by r" in list(found.lines())
    assert any(row.endswith("GROWS") for row in table(trends))
    steady = {name: one for name, one in trends.items() if not one.grows}
    assert Soaked(samples, steady, {}, {}, []).is_good
    assert not Soaked(samples, steady, {}, {"cut": 1}, []).is_good
    assert not Soaked(samples, steady, {}, {}, ["replicas hold blocks"]).is_good


def test_processes_below_this_one_are_sampled() -> None:
    code = (
        "import threading, sys; threading.Thread(target=sys.stdin.read).start(); print(flush=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.readline()
        samples = Samples()
        samples.take(0.0, None)
        child.stdin.close()
    mine = {
        measure: series[0].value
        for (subject, measure), series in samples.series.items()
        if subject.endswith(f" {child.pid}")
    }
    assert mine.keys() == {"memory_mib", "files", "threads", "connections"}
    assert mine["threads"] == 2
    assert mine["memory_mib"] > 1
    assert mine["files"] >= 3
    assert mine.keys() < LIMITS.keys()


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (["ray::ServeReplica:llm:Engine.asgi"], "replica"),
        (["ray::ServeReplica:llm:Ingress"], "ingress"),
        (["VLLM::EngineCore"], "engine"),
        (["/x/raylet/raylet", "--a"], "raylet"),
        (["/bin/python", "-u", "/x/dashboard/agent.py"], "agent"),
        (["/bin/python", "-m", "router.inspect", "--json"], ""),
        ([], ""),
    ],
)
def test_processes_are_named_by_what_they_do(command: list[str], expected: str) -> None:
    assert role_of(command) == expected


class Words:
    """A tokenizer of characters."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return [ord(letter) % 100 for letter in text]

    def decode(self, token_ids: list[int]) -> str:
        return "".join(chr(97 + token % 26) for token in token_ids)


def test_all_workloads_take_turns() -> None:
    asked = mixed_sessions(Words(), 4096, Sizes(900, 96), seed=0)
    kinds = [one.session_id.rpartition("-")[0] for one in itertools.islice(asked, 12)]
    assert len(set(kinds[:6])) == len(WORKLOADS)
    assert kinds[:6] == kinds[6:]


class Server:
    """Answers each request by the next of its behaviours."""

    def __init__(self, *behaviours: str) -> None:
        self.asked: list[str] = []
        self._behaviours = iter(behaviours)

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0)
        self.asked.append(request.url.path)
        text = "".join(completion_lines({"messages": []}, 3))
        match next(self._behaviours, "good"):
            case "cut":
                text = text.replace("data: [DONE]\n\n", "")
            case "full":
                return httpx.Response(503)
            case "bad":
                return httpx.Response(500)
            case "broken":
                text = 'data: {"error": {"message": "oh"}}\n\n'
        return httpx.Response(200, text=text)


def talks() -> Iterator[Session]:
    for number in itertools.count():
        yield Session(f"s{number}", (Turn("Why?", 3), Turn("And?", 3)))


@pytest.mark.parametrize(
    ("behaviour", "failures"),
    [
        ("good", {}),
        ("full", {}),
        ("cut", {"cut": 1}),
        ("bad", {"status 500": 1}),
        ("broken", {"StreamBroken: oh": 1}),
    ],
)
async def test_a_load_counts_what_an_idle_deployment_would_not_do(
    behaviour: str, failures: dict[str, int]
) -> None:
    server = Server(behaviour)
    client = httpx.AsyncClient(base_url="http://fake", transport=httpx.MockTransport(server))
    load = MixedLoad(client, "fake", talks(), seed=2)
    await load.run(users=1, seconds=0.05)
    assert load.failures == failures
    assert sum(load.outcomes.values()) == len(server.asked) > 0


async def test_every_length_is_asked_for_before_the_load() -> None:
    asked: list[dict[str, Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        asked.append(json.loads(request.content))
        return httpx.Response(200, json={})

    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        await fill_by_size(client, "model", 1000, seed=0, most_tokens=20)
    assert [len(body["prompt"]) for body in asked] == list(range(1, 21))
    # None begins as another one does, so that no prefix is cached.
    assert len({body["prompt"][0] for body in asked}) > 15


async def test_some_clients_leave() -> None:
    server = Server()
    client = httpx.AsyncClient(base_url="http://fake", transport=httpx.MockTransport(server))
    load = MixedLoad(client, "fake", talks(), seed=0)
    await load.run(users=2, seconds=1.0)
    assert load.outcomes["left"]
    assert load.outcomes["answered"] > load.outcomes["left"]
    assert not load.failures


def test_the_soaked_deployment_is_valid_and_lends_and_keeps_sessions() -> None:
    (application,) = twins_config()["applications"]
    made: Any = AppConfig.model_validate(application["args"])
    assert made.spill.enabled
    assert made.replica.count == 2
    assert application["args"]["compression"]["sessions"]["enabled"]
