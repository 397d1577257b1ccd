"""The order of a load test's sessions, and when it is over."""

import random

from adakv_serve.loadtest.client.records import Record
from adakv_serve.loadtest.traffic.load import Load, Schedule
from adakv_serve.loadtest.traffic.workloads import Session, Turn


def session(number: int, turns: int = 1, at_s: float | None = None) -> Session:
    return Session(f"s{number}", (Turn("text", 5),) * turns, at_s=at_s)


def answer(load: Load) -> bool:
    assert load.begin_request()
    return load.end_request(Record("s", 0, at_s=0.0))


def test_nothing_begins_before_the_warm_up_has_been_answered() -> None:
    load = Load("m", Schedule(session(number, turns=3) for number in range(9)), 2, requests=2)
    for _ in range(2):
        assert not load.must_wait()
        due = load.next_session()
        assert due is not None
        # One request of each session.
        assert len(due.session.turns) == 1
        assert load.begin_request()
    assert load.must_wait()
    assert not load.end_request(Record("s", 0, at_s=0.0))
    load.end_session()
    assert load.must_wait()
    assert not load.end_request(Record("s", 0, at_s=0.0))
    load.end_session()
    assert not load.must_wait()
    due = load.next_session()
    assert due is not None
    assert due.session == session(2, turns=3)
    assert answer(load)
    assert not load.is_over()
    assert answer(load)
    assert not load.begin_request()
    load.end_session()
    assert load.is_over()
    assert len(load.records) == 2


def test_sessions_that_only_wait_for_their_time_do_not_hold_up_the_end() -> None:
    sessions = (session(number) for number in range(100))
    load = Load("m", Schedule(sessions, rate_per_s=0.001, rng=random.Random(0)), requests=1)
    for _ in range(5):
        assert load.next_session() is not None
    assert answer(load)
    assert load.is_over()


def test_a_trace_is_over_when_its_last_session_is() -> None:
    trace = [session(0, at_s=7.0), session(1, at_s=9.5)]
    load = Load("m", Schedule.replay(trace))
    first, second = load.next_session(), load.next_session()
    assert first is not None
    assert second is not None
    assert (first.at_s, second.at_s) == (0.0, 2.5)
    assert load.next_session() is None
    for _ in range(2):
        assert not load.is_over()
        answer(load)
        load.end_session()
    assert load.is_over()


def test_a_warm_up_that_takes_all_there_is_ends_the_test() -> None:
    load = Load("m", Schedule([session(0)]), warmup=3)
    assert load.next_session() is not None
    answer(load)
    load.end_session()
    assert load.next_session() is None
    assert load.is_over()
