"""A replica that is removed: its requests and its sessions go on at the one that stays.

What an ingress cannot finish in time ends with an error.
"""

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from tests.system.deployment import MODEL, Deployment, dashboard_metrics, deployed, twins_config
from tests.system.spilling import SENTENCE, ask, ask_many, moves
from tests.waiting import eventually

pytestmark = [pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def twins() -> Iterator[Deployment]:
    with deployed(config=twins_config) as deployment:
        yield deployment


class Talk:
    """A conversation about one text; each turn says which replica answered, and from what."""

    def __init__(self, client: openai.OpenAI, number: int) -> None:
        self._client = client
        self._messages: list[dict[str, str]] = []
        self._text = f"{number}. {SENTENCE * 60}"

    def ask(self) -> tuple[str, dict[str, Any]]:
        question = f"{self._text if not self._messages else ''} What else did the master write?"
        self._messages.append({"role": "user", "content": question})
        raw: Any = self._client.chat.completions.with_raw_response.create(
            model=MODEL, messages=self._messages, max_tokens=24, temperature=0,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        answer = raw.parse()
        self._messages.append({"role": "assistant", "content": answer.choices[0].message.content})
        session: dict[str, Any] = answer.model_extra["kv_compression"]["session"]
        return raw.headers["x-replica-id"], session


def test_a_session_is_found_wherever_its_next_turn_goes(twins: Deployment) -> None:
    eventually(lambda: len(twins.who_answer()) == 2, 60, "answers from both")
    client = twins.client(timeout=300)
    talks = [Talk(client, number) for number in range(100, 106)]
    with ThreadPoolExecutor(len(talks)) as pool:
        first = list(pool.map(Talk.ask, talks))
        assert len({replica for replica, _ in first}) == 2
        # All at once, with others beside them: not every turn goes where its session is.
        sources = []

        def elsewhere() -> bool:
            busy = pool.submit(ask_many, twins, range(200, 204), tokens=60)
            sources.extend(session for _, session in pool.map(Talk.ask, talks))
            busy.result()
            return any(session["source"] == "replica" for session in sources)

        eventually(elsewhere, 300, "a turn at another replica than its session")
    assert all(one["resumed_tokens"] for one in sources if one["source"] is not None)


def _scale_down(config: dict[str, Any]) -> None:
    (engine,) = config["applications"][0]["deployments"]
    engine["num_replicas"] = 1


def test_requests_leave_a_replica_that_is_removed_and_no_client_notices(
    twins: Deployment,
) -> None:
    eventually(lambda: len(twins.who_answer()) == 2, 60, "answers from both")
    numbers, tokens, enough = range(4), 300, threading.Event()
    client = twins.client(timeout=300)
    talks = [Talk(client, number) for number in range(300, 304)]
    with ThreadPoolExecutor(len(talks)) as pool:
        before = list(pool.map(Talk.ask, talks))

    def keep_asking(number: int) -> set[str]:
        answers = set()
        while not enough.is_set():
            answers.add(ask(client, number, stream=True, tokens=tokens))
        return answers

    with ThreadPoolExecutor(len(numbers)) as pool:
        asked = [pool.submit(keep_asking, number) for number in numbers]
        try:
            eventually(
                lambda: all(load.blocks_compressed for load in twins.occupancy().values()),
                60,
                "compressed requests on both",
            )
            # Beside engines at work it may take long until Serve has taken it in.
            twins.reconfigure(_scale_down)
            eventually(lambda: moves(twins), 180, "a request that has moved")
        finally:
            enough.set()
        answers = [answer.result() for answer in asked]
    eventually(lambda: len(twins.occupancy()) == 1, 60, "one replica")
    # Its sessions are not lost either.
    last = [talk.ask() for talk in talks]
    assert [session["turn"] for _, session in last] == [2] * len(talks), last
    names = {name for name in dashboard_metrics() if re.search("session|resumed", name)}
    eventually(lambda: names <= twins.metric_names(), 30, f"what tells of sessions, {names}")
    assert any(replica not in twins.occupancy() for replica, _ in before)
    assert answers == [{answer} for answer in ask_many(twins, numbers, tokens=tokens)]


def _allow_little_time(config: dict[str, Any]) -> None:
    args = config["applications"][0]["args"]
    args["replica"]["graceful_shutdown_timeout_s"] = 10
    args["ingress"]["count"] = 1


def _retry_later(config: dict[str, Any]) -> None:
    config["applications"][0]["args"]["ingress"]["retry_after_s"] = 2


def test_a_stream_longer_than_a_redeployment_allows_ends_with_an_error_event(
    twins: Deployment,
) -> None:
    before, begun = set(twins.pids("ServeReplica:llm")), threading.Event()
    twins.reconfigure(_allow_little_time)
    eventually(
        lambda: before.isdisjoint(twins.pids("ServeReplica:llm")) and twins.occupancy(),
        300, "an ingress and an engine with another limit",
    )  # fmt: skip
    eventually(twins.who_answer, 120, "answers")

    def read() -> str | None:
        """Return the finish reason."""
        stream: Any = twins.client(timeout=300).completions.create(
            model=MODEL, prompt="Once", max_tokens=4000, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        reason = None
        for chunk in stream:
            begun.set()
            reason = chunk.choices[0].finish_reason
        return reason

    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(read)
        assert begun.wait(120)
        twins.reconfigure(_retry_later)
        with pytest.raises(openai.APIError) as ended:
            pytest.fail(f"it ended with {answer.result(timeout=300)}")
    # One that breaks off is an APIConnectionError.
    assert ended.type is openai.APIError
