"""Which requests of lost replicas are sent once more."""

import asyncio

import pytest

from adakv_serve.serving.http.failures import (
    BackendFailure,
    NoReplica,
    Overloaded,
    ReplicaDown,
    ReplicaLost,
)
from adakv_serve.serving.http.retries import Continuations, Recent, Retries
from tests.serving.http.scripted_backend import WHOLE, Clock, ScriptedBackend, client


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def retries(clock: Clock) -> Retries:
    return Retries(clock)


def retried(retries: Retries, requests: int) -> int:
    """Return how many of so many requests, all of which lose their replicas, are sent again."""
    pauses = [retries.begin().pause_after(ReplicaLost()) for _ in range(requests)]
    return sum(pause is not None for pause in pauses)


def test_no_more_than_the_last_seconds_are_remembered(clock: Clock) -> None:
    recent = Recent(clock, window_s=60.0)
    for _ in range(1000):
        recent.note()
        clock.now += 1.0
    assert len(recent) <= 62


def test_a_few_requests_are_retried_even_without_other_traffic(retries: Retries) -> None:
    assert retried(retries, 5) == 5


def test_of_many_lost_requests_only_a_share_is_retried(retries: Retries, clock: Clock) -> None:
    assert retried(retries, 100) == 20
    # What was a minute ago does not count.
    clock.now += 61
    assert retried(retries, 8) == 5


def test_the_share_is_of_all_requests(retries: Retries) -> None:
    for _ in range(900):
        retries.begin()
    assert retried(retries, 300) == 240


async def test_requests_that_kill_engines_do_not_kill_many_more() -> None:
    backend = ScriptedBackend(*[[ReplicaLost()]] * 100)
    door = client(backend)
    answers = await asyncio.gather(*(door.post("/v1/completions") for _ in range(30)))
    assert {answer.status_code for answer in answers} == {503}
    assert len(backend.calls) == 30 + 6


def test_a_request_is_retried_once(retries: Retries) -> None:
    attempts = retries.begin()
    assert attempts.pause_after(ReplicaLost()) is not None
    assert attempts.pause_after(ReplicaLost()) is None


@pytest.mark.parametrize(("worked_s", "again"), [(29.0, True), (31.0, False)])
def test_long_work_is_not_done_again(
    retries: Retries, clock: Clock, worked_s: float, again: bool
) -> None:
    attempts = retries.begin()
    clock.now += worked_s
    assert (attempts.pause_after(ReplicaLost()) is not None) == again


@pytest.mark.parametrize("failure", [Overloaded(None), NoReplica()])
def test_what_no_replica_has_taken_is_refused_at_once(
    retries: Retries, failure: BackendFailure
) -> None:
    assert retries.begin().pause_after(failure) is None


def test_replicas_without_an_engine_cost_no_retry_until_they_must_be_replaced(
    retries: Retries, clock: Clock
) -> None:
    attempts = retries.begin()
    for _ in range(10):
        assert attempts.pause_after(ReplicaDown()) is not None
        clock.now += 1
    assert attempts.pause_after(ReplicaLost()) is not None
    assert retried(retries, 5) == 4
    clock.now += 6
    assert attempts.pause_after(ReplicaDown()) is None


async def test_a_request_that_met_no_engine_is_answered_by_another_replica() -> None:
    backend = ScriptedBackend([ReplicaDown()], [ReplicaDown()], [ReplicaLost()], [WHOLE])
    assert (await client(backend).post("/v1/completions")).status_code == 200


def test_pauses_differ(retries: Retries) -> None:
    pauses = {retries.begin().pause_after(ReplicaDown()) for _ in range(20)}
    assert len(pauses) == 20
    assert all(pause is not None and 0.25 <= pause <= 0.5 for pause in pauses)


def test_a_stream_goes_on_three_times_if_it_gets_on(clock: Clock) -> None:
    continuations = Continuations(clock)
    went_on = [continuations.pause_after(ReplicaLost(), tokens) for tokens in (0, 1, 2, 3)]
    assert [pause is not None for pause in went_on] == [True, True, True, False]


def test_a_stream_that_kills_engines_at_one_token_does_not_go_on(clock: Clock) -> None:
    continuations = Continuations(clock)
    assert continuations.pause_after(ReplicaLost(), 7) is not None
    assert continuations.pause_after(ReplicaLost(), 7) is None


@pytest.mark.parametrize("failure", [ReplicaDown(), Overloaded(1.0), NoReplica()])
def test_a_stream_waits_for_a_place_for_some_seconds(clock: Clock, failure: BackendFailure) -> None:
    continuations = Continuations(clock)
    clock.now += 3600
    assert continuations.pause_after(ReplicaLost(), 7) is not None
    for _ in range(14):
        clock.now += 1
        assert continuations.pause_after(failure, 7) is not None
    clock.now += 2
    assert continuations.pause_after(failure, 7) is None
