"""A replica that is removed: its compressed requests go on at the one that stays."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.system.deployment import Deployment, deployed, eventually, twins_config
from tests.system.spilling import ask, ask_many, moves

pytestmark = pytest.mark.slow


@pytest.fixture
def twins() -> Iterator[Deployment]:
    with deployed(config=twins_config) as deployment:
        yield deployment


def _scale_down(config: dict[str, Any]) -> None:
    (engine,) = config["applications"][0]["deployments"]
    engine["num_replicas"] = 1


def test_requests_leave_a_replica_that_is_removed_and_no_client_notices(
    twins: Deployment,
) -> None:
    eventually(lambda: len(twins.who_answer()) == 2, 60, "answers from both")
    numbers, tokens, enough = range(4), 300, threading.Event()
    client = twins.client(timeout=300)

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
    assert answers == [{answer} for answer in ask_many(twins, numbers, tokens=tokens)]
