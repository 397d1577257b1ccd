"""The running application while clients leave, replicas die and the store goes away."""

import functools
import http.client
import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import openai
import psutil
import pytest
import redis

from tests.system.deployment import MODEL, Deployment
from tests.waiting import eventually

ENDLESS: dict[str, Any] = {
    "model": MODEL, "prompt": "Once upon a time", "max_tokens": 4000,
    "extra_body": {"ignore_eos": True},
}  # fmt: skip


@pytest.fixture(autouse=True)
def _whole_deployment(deployment: Deployment) -> None:
    eventually(lambda: len(deployment.occupancy()) == 2, 120, "two replicas before the test")
    eventually(lambda: deployment.running() == 0, 60, "an idle deployment before the test")


def _finish(
    client: openai.OpenAI,
    number: int,
    max_tokens: int = 60,
    begun: Callable[[], None] = lambda: None,
) -> str:
    """One streamed answer: its finish reason, or how it broke.

    Args:
        begun: called when its first token is there.
    """
    try:
        stream = client.completions.create(
            model=MODEL, prompt=f"{number}. Once", max_tokens=max_tokens, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        reasons = []
        for chunk in stream:
            if not reasons:
                begun()
            reasons += [choice.finish_reason for choice in chunk.choices]
        return reasons[-1] or "cut"
    except openai.APIError as error:
        return f"{type(error).__name__}: {error}"


def _under_traffic(ask: Callable[[int], str], meanwhile: Callable[[], None]) -> list[str]:
    """Keeps six requests going for as long as `meanwhile` takes; returns all outcomes."""
    enough = threading.Event()

    def keep_asking(number: int) -> list[str]:
        outcomes = []
        while not enough.is_set():
            outcomes.append(ask(number))
        return outcomes

    with ThreadPoolExecutor(6) as pool:
        traffic = [pool.submit(keep_asking, number) for number in range(6)]
        try:
            meanwhile()
        finally:
            enough.set()
        return [outcome for asked in traffic for outcome in asked.result()]


def _wait_until_both_work(deployment: Deployment) -> None:
    # A new replica reports before Serve sends it anything.
    eventually(
        lambda: all(report.running > 1 for report in deployment.occupancy().values()),
        120, "both replicas running",
    )  # fmt: skip


def test_concurrent_requests_use_both_replicas(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    inspected: list[dict[str, Any]] = []

    def shows_running() -> bool:
        inspected[:] = deployment.inspect()
        return sum(replica["running"] for replica in inspected) > 0

    def look() -> None:
        _wait_until_both_work(deployment)
        # Between two requests there may be none for a moment.
        eventually(shows_running, 30, "running requests in the table")

    outcomes = _under_traffic(lambda number: _finish(client, number), look)
    assert set(outcomes) == {"length"}
    assert len(inspected) == 2
    eventually(
        lambda: all(r.blocks_free == r.blocks_total for r in deployment.occupancy().values()),
        30, "all blocks free again",
    )  # fmt: skip


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_disconnects_stops_its_generation(
    deployment: Deployment, client: openai.OpenAI, stream: bool
) -> None:
    body = {**ENDLESS, "ignore_eos": True, "stream": stream}
    body.pop("extra_body")
    headers = {"authorization": f"Bearer {client.api_key}", "content-type": "application/json"}
    # Leaves the answer unread, so that closing it closes the connection at once.
    connection = http.client.HTTPConnection(deployment.base_url.removeprefix("http://"))
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    eventually(lambda: deployment.running() == 1, 30, "the request running")
    connection.close()
    # It would run for more than a minute; a second is the promise, the rest is a slow machine's.
    eventually(lambda: deployment.running() == 0, 30, "the generation stopped")


class Told(NamedTuple):
    """A streamed answer as its client reads it."""

    text: str
    finish_reason: str | None
    tokens: int
    names: set[str]


def _tell(
    client: openai.OpenAI, number: int, begun: Callable[[int], None] = lambda tokens: None
) -> Told:
    """Ask for a long greedy answer.

    Args:
        begun: called with the number of its tokens so far.
    """
    stream = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": f"{number}. Tell me a story."}],
        max_tokens=160, temperature=0, stream=True,
        stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
    )  # fmt: skip
    text, reason, tokens, names = "", None, 0, set()
    for count, chunk in enumerate(stream):
        begun(count)
        names.add(f"{chunk.id} {chunk.created}")
        tokens = chunk.usage.completion_tokens if chunk.usage else tokens
        for choice in chunk.choices:
            text += choice.delta.content or ""
            reason = choice.finish_reason or reason
    return Told(text, reason, tokens, names)


def _ask_whole(client: openai.OpenAI, number: int, max_tokens: int = 60) -> str:
    """Ask for an answer that is not streamed; return its finish reason."""
    answer = client.completions.create(
        model=MODEL, prompt=f"{number}. Once", max_tokens=max_tokens,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    return answer.choices[0].finish_reason


@pytest.mark.slow
@pytest.mark.parametrize(
    "victim", [pytest.param("ServeReplica:llm:Engine", marks=pytest.mark.long), "VLLM::EngineCore"]
)
def test_no_answer_of_a_killed_replica_is_lost_and_streams_read_as_if_it_lived(
    deployment: Deployment, client: openai.OpenAI, victim: str
) -> None:
    before = set(deployment.occupancy())
    eventually(lambda: len(deployment.who_answer()) == 2, 120, "answers from both")
    seen: dict[int, int] = {}
    streams: list[Future[Told]] = []
    with ThreadPoolExecutor(10) as pool:
        # When the replica dies, some streams have just begun and others are almost complete.
        for have in (80, 30, 1):
            numbers = range(len(streams), len(streams) + 2)
            streams += [
                pool.submit(_tell, client, number, functools.partial(seen.__setitem__, number))
                for number in numbers
            ]
            eventually(
                lambda numbers=numbers, have=have: all(seen.get(n, 0) >= have for n in numbers),
                120, f"{have} tokens",
            )  # fmt: skip
        whole = [pool.submit(_ask_whole, client, number, 100) for number in range(4)]
        _wait_until_both_work(deployment)
        deployment.kill(victim)
        answers = [answer.result() for answer in streams]
        assert {answer.result() for answer in whole} == {"length"}
    assert all(len(answer.names) == 1 for answer in answers)
    assert {(answer.finish_reason, answer.tokens) for answer in answers} == {("length", 160)}
    eventually(
        lambda: len(now := set(deployment.occupancy())) == 2 and now != before,
        150, "the killed replica replaced",
    )  # fmt: skip
    assert "goes on at another replica" in deployment.log()
    with ThreadPoolExecutor(len(answers)) as pool:
        alone = list(pool.map(functools.partial(_tell, client), range(len(answers))))
    assert [answer.text for answer in answers] == [answer.text for answer in alone]


@pytest.mark.slow
@pytest.mark.long
def test_a_hung_engine_process_is_ended_and_replaced_and_loses_no_request_without_first_byte(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    before = set(deployment.occupancy())

    def hang() -> None:
        _wait_until_both_work(deployment)
        hung = psutil.Process(deployment.pids("VLLM::EngineCore")[0])
        os.kill(hung.pid, signal.SIGSTOP)
        eventually(lambda: len(deployment.occupancy()) == 1, 60, "no report of the hung engine")
        eventually(lambda: not hung.is_running(), 60, "the hung engine ended")
        eventually(
            lambda: len(now := set(deployment.occupancy())) == 2 and now != before,
            150, "the replica with the hung engine replaced",
        )  # fmt: skip

    outcomes = _under_traffic(functools.partial(_ask_whole, client), hang)
    assert set(outcomes) == {"length"}


def test_engines_outlive_a_killed_controller(deployment: Deployment) -> None:
    engines = deployment.pids("ServeReplica:llm:Engine")
    assert len(engines) == 2
    killed = deployment.kill("ServeController")
    controller = eventually(
        lambda: [pid for pid in deployment.pids("ServeController") if pid != killed], 60, "another"
    )
    # It asks all replicas who they are, and stops those that do not answer, before it says so.
    recovered = f"controller {controller[0]} -- Recovering current state for Deployment"
    eventually(lambda: recovered in deployment.log(), 60, "the replicas known again")
    # Ingresses hear of them one after the other.
    eventually(lambda: len(deployment.who_answer()) == 2, 60, "answers of both")
    assert deployment.pids("ServeReplica:llm:Engine") == engines


def test_a_killed_store_comes_back_and_no_request_notices(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(_finish, client, number) for number in range(4)]
        killed = deployment.kill("valkey-server")
        eventually(
            lambda: deployment.pids("valkey-server") not in ([], [killed]), 30, "a new Valkey"
        )
        assert {answer.result() for answer in answers} == {"length"}
    eventually(lambda: len(deployment.occupancy()) == 2, 30, "both replicas reporting again")


def test_a_store_that_stalls_and_forgets_loses_no_request(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    def trouble() -> None:
        _wait_until_both_work(deployment)
        with redis.Redis.from_url(deployment.store_url) as store:
            for _ in range(2):
                store.client_pause(2000)
                store.flushall()  # Answered once the pause is over.
                eventually(lambda: len(deployment.occupancy()) == 2, 30, "both reporting again")

    outcomes = _under_traffic(lambda number: _finish(client, number), trouble)
    assert set(outcomes) == {"length"}


@pytest.mark.slow
def test_a_drained_deployment_ends_its_streams_refuses_others_and_opens_again(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    def refused() -> bool:
        with pytest.raises(openai.APIStatusError) as refusal:
            client.completions.create(model=MODEL, prompt="Once", max_tokens=1)
        assert refusal.value.status_code == 503
        assert int(refusal.value.response.headers["retry-after"]) >= 1
        return not deployment.healthy()

    begun: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        answers = [
            pool.submit(_finish, client, number, 160, lambda: begun.append(1))
            for number in range(4)
        ]
        eventually(lambda: len(begun) == 4, 60, "four streams")
        drain = deployment.start_drain("--limit-s", "120", "--hold-s", "1")
        eventually(lambda: not deployment.healthy(), 60, "a shut door")
        assert refused()
        output, _ = drain.communicate(timeout=200)
        assert drain.returncode == 0, output
        assert output.splitlines()[-1] == "0 requests run"
        # Each was whole when the command ended.
        assert [answer.result() for answer in answers] == ["length"] * 4
    eventually(deployment.healthy, 60, "an open door")
    assert _finish(client, 0) == "length"


@pytest.mark.slow
def test_a_drain_says_what_is_left_at_its_limit_and_ends_it_where_asked(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    begun = threading.Event()
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(_finish, client, 1, 4000, begun.set)
        assert begun.wait(60)
        drain = deployment.start_drain("--limit-s", "1", "--hold-s", "0", "--cut")
        output, _ = drain.communicate(timeout=200)
        assert drain.returncode == 1
        assert re.search(r"request \S+ has run for \d+ s", output), output
        assert "APIError: the server takes no more requests" in answer.result(timeout=60)
    eventually(deployment.healthy, 60, "an open door")
    assert _finish(client, 2) == "length"


@pytest.mark.slow
@pytest.mark.long
def test_a_changed_configuration_replaces_both_replicas_and_loses_no_stream(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    before = set(deployment.occupancy())

    def ask(number: int) -> str:
        # Some are long: they run while their replica and their ingress are replaced.
        return _finish(client, number, 400 if number % 2 else 60)

    def change(config: dict[str, Any]) -> None:
        args = config["applications"][0]["args"]
        args["engine"]["max_num_seqs"] = 24
        args["ingress"] = {"retry_after_s": 2}

    def redeploy() -> None:
        _wait_until_both_work(deployment)
        deployment.reconfigure(change)
        eventually(
            lambda: len(now := set(deployment.occupancy())) == 2 and not now & before,
            400, "both replicas replaced",
        )  # fmt: skip
        eventually(lambda: len(deployment.who_answer()) == 2, 120, "answers from both")

    outcomes = _under_traffic(ask, redeploy)
    assert set(outcomes) == {"length"}


@pytest.mark.slow
def test_a_second_serve_run_on_top_of_the_first(
    deployment: Deployment, client: openai.OpenAI
) -> None:
    stores = deployment.pids("valkey-server")
    second = deployment.serve_run()
    deadline = time.monotonic() + 20
    outcomes = []
    while time.monotonic() < deadline:
        outcomes.append(_finish(client, len(outcomes)))
    assert set(outcomes) == {"length"}
    assert second.poll() is None
    assert deployment.pids("valkey-server") == stores
    eventually(lambda: len(deployment.occupancy()) == 2, 30, "both replicas reporting")
