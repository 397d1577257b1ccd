"""The fuzzer: its requests, what it sends over a socket, and what it calls a fault."""

import asyncio
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from adakv_serve.loadtest.fuzzing.attempts import KINDS, UNCHANGED, Attempt, Target, attempt
from adakv_serve.loadtest.fuzzing.bodies import is_bounded
from adakv_serve.loadtest.fuzzing.campaign import Campaign, Judged, table
from adakv_serve.loadtest.fuzzing.exchange import Answer, End, Exchange, exchange
from adakv_serve.loadtest.fuzzing.forms import FORMS
from adakv_serve.loadtest.fuzzing.sending import Sending
from adakv_serve.loadtest.fuzzing.verdicts import problem
from adakv_serve.loadtest.servers.fleet import Life, changed, held, wait_until_idle
from adakv_serve.loadtest.servers.occupancy import Look, OccupancyWatch
from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.serving.http.paths import Paths

TARGET = Target("fake", "key")
OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
ERROR = {"error": {"message": "no", "type": "BadRequestError", "param": None, "code": 400}}


def attempts(count: int, seed: int = 0) -> list[Attempt]:
    return [attempt(seed, number, TARGET) for number in range(count)]


def test_a_number_of_a_seed_is_the_same_request_in_every_process() -> None:
    code = (
        "import hashlib; from adakv_serve.loadtest.fuzzing.attempts import *\n"
        "made = [attempt(5, n, Target('fake', 'key')) for n in range(400)]\n"
        "print(hashlib.sha256(repr(made).encode()).hexdigest())"
    )
    printed = {
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, check=True, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        ).stdout.strip()
        for seed in ("1", "2")
    }  # fmt: skip
    assert printed == {hashlib.sha256(repr(attempts(400, 5)).encode()).hexdigest()}
    assert attempts(20, 6) != attempts(20, 5)


def test_a_number_can_be_made_without_those_before_it() -> None:
    assert attempt(0, 37, TARGET) == attempts(40)[37]


def test_all_endpoints_and_kinds_of_mutation_come_up() -> None:
    made = attempts(2500)
    assert {one.path for one in made} == {form.path for form in FORMS}
    assert {one.kinds[0] for one in made} == set(KINDS)
    assert max(len(one.kinds) for one in made) == 3


def test_every_endpoint_of_the_forms_is_open() -> None:
    assert [form.path for form in FORMS if not Paths().allow(form.path)] == []


def test_an_unchanged_request_is_a_valid_one_with_the_key() -> None:
    honest = [one for one in attempts(2000) if one.kinds == (UNCHANGED,)]
    for one in honest:
        (data,) = one.sending.pieces
        head, _, body = data.partition(b"\r\n\r\n")
        assert b"authorization: Bearer key" in head
        assert one.sending.leaves_after_s is None
        if head.startswith(b"POST"):
            assert json.loads(body)["model"] == "fake"
    assert honest


def test_requests_stay_small() -> None:
    assert max(len(b"".join(one.sending.pieces)) for one in attempts(1500)) < 16 << 20


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, True),
        ({"user": "x"}, True),
        ({"max_tokens": 9}, False),
        ({"n": 3}, False),
        ({"prompt": "x" * 9}, False),
    ],
)
def test_a_request_is_bounded_while_nothing_has_changed_that_it_costs(
    change: dict[str, Any], expected: bool
) -> None:
    before = {"prompt": "a", "max_tokens": 3}
    assert is_bounded(before, {**before, **change}) is expected
    assert not is_bounded(before, {"prompt": "a"})


@contextmanager
def listening(serve: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that plays a part on each connection, until the block ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    serve(connection)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.getsockname()[1]}"
        finally:
            server.shutdown(socket.SHUT_RDWR)
            thread.join()


def sends(data: bytes) -> Callable[[socket.socket], None]:
    """Read something, answer, close."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(data)

    return serve


def stalls(data: bytes) -> Callable[[socket.socket], None]:
    """Answer with this, and wait until the client has left."""

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(data)
        while connection.recv(65536):
            pass

    return serve


CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
WAITS = Sending((b"POST / HTTP/1.1\r\n\r\n",), ("POST",))


@pytest.mark.parametrize(
    ("server", "sending", "end", "statuses"),
    [
        (sends(OK), WAITS, End.ANSWERED, [200]),
        (sends(OK + OK), WAITS._replace(owed=("POST", "POST")), End.ANSWERED, [200, 200]),
        (sends(OK), WAITS._replace(owed=("POST", "POST")), End.CLOSED, [200]),
        (sends(b""), WAITS, End.CLOSED, []),
        (sends(OK[:-1]), WAITS, End.CUT, []),
        (sends(CHUNKED + b"5\r\nab"), WAITS, End.CUT, []),
        (stalls(b""), WAITS, End.HUNG, []),
        (stalls(OK[:-1]), WAITS, End.HUNG, []),
        (stalls(b""), WAITS._replace(leaves_after_s=0.1), End.LEFT, []),
        (stalls(b""), WAITS._replace(leaves_after_s=0.0, owed=()), End.LEFT, []),
        (stalls(OK), WAITS._replace(pieces=(b"POST / ", b"HTTP/1.1\r\n"), pause_s=0.01),
         End.ANSWERED, [200]),
        (stalls(OK), WAITS._replace(shuts=True), End.ANSWERED, [200]),
    ],
)  # fmt: skip
def test_an_exchange_says_how_it_ended(
    server: Callable[[socket.socket], None], sending: Sending, end: End, statuses: list[int]
) -> None:
    with listening(server) as url:
        found = exchange(url, sending, limit_s=0.5)
    assert (found.end, [answer.status for answer in found.answers]) == (end, statuses)


def test_fewer_answers_are_enough_when_the_server_says_that_it_closes() -> None:
    closing = OK.replace(b"200 OK", b"200 OK\r\nconnection: close")
    with listening(sends(closing)) as url:
        assert exchange(url, WAITS._replace(owed=("POST", "POST")), 5).end == End.ANSWERED


def an_answer(status: int, body: Any = None, **headers: str) -> Answer:
    sent = {"content-type": "application/json", **headers}
    return Answer(status, sent, json.dumps(ERROR if body is None else body).encode())


def a_stream(*events: str) -> Answer:
    body = "".join(f"data: {event}\n\n" for event in events).encode()
    return Answer(200, {"content-type": "text/event-stream; charset=utf-8"}, body)


RETRY, ID = {"retry-after": "1"}, {"x-request-id": "a"}
LOST = {"error": {"message": "the replica died", "type": "ReplicaLost", "code": 503}}
FAILED = {"error": {"message": "oh", "type": "InternalServerError", "code": 500}}


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (an_answer(200, {}), None),
        (an_answer(400), None),
        (an_answer(400, {"type": "error", "error": {"message": "a", "type": "b"}}), None),
        (an_answer(400, {"detail": "no"}, **ID), "the error of status 400 is not in OpenAI's form"),
        (Answer(400, {}, b"<html><body><h1>400 Bad request</h1>"), None),
        (Answer(400, {}, b"Invalid HTTP request received."), "not in OpenAI's form"),
        (Answer(400, ID, b"<html>"), "the error of status 400 is not in OpenAI's form"),
        (an_answer(500), "status 500"),
        (an_answer(501), "status 501"),
        (an_answer(503, **RETRY), None),
        (an_answer(503), "without Retry-After"),
        (an_answer(503, {"detail": "no"}, **RETRY), "not in OpenAI's form"),
        (an_answer(503, LOST, **RETRY), "the replica died"),
        (Answer(200, {"content-type": "application/json"}, b"{"), "is no JSON"),
        (a_stream("{}", "[DONE]"), None),
        (a_stream('{"type": "message_stop"}'), None),
        (a_stream('{"type": "response.completed"}'), None),
        (a_stream(json.dumps(ERROR)), None),
        (a_stream("{}"), "no end"),
        (a_stream(), "no end"),
        (a_stream(json.dumps(FAILED), "[DONE]"), "error 500 in a stream"),
        (a_stream('{"error": "oh"}', "[DONE]"), "not in OpenAI's form"),
    ],
)
def test_what_is_wrong_with_an_answer(answer: Answer, expected: str | None) -> None:
    made = attempt(0, 0, TARGET)._replace(sending=WAITS)
    found = problem(made, Exchange((answer,), End.ANSWERED, 0.1))
    assert (found is None) if expected is None else (found is not None and expected in found)


def test_each_answer_is_judged_by_its_own_requests_method() -> None:
    bare = Answer(404, {}, b"")
    for owed, is_fault in (("GET", "HEAD"), False), (("HEAD", "GET"), True):
        made = attempt(0, 0, TARGET)._replace(sending=WAITS._replace(owed=owed))
        found = Exchange((an_answer(200, {}), bare), End.ANSWERED, 0.1)
        assert (problem(made, found) is not None) == is_fault


@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_an_answer_that_came_before_its_client_left_is_judged_by_the_method_too(
    method: str,
) -> None:
    leaves = WAITS._replace(owed=(), method=method, leaves_after_s=0.1)
    made = attempt(0, 0, TARGET)._replace(sending=leaves)
    found = problem(made, Exchange((Answer(405, {}, b""),), End.ANSWERED, 0.0))
    assert (found is None) == (method == "HEAD")


@pytest.mark.parametrize(
    ("end", "owed", "is_fault"),
    [
        (End.HUNG, True, True),
        (End.CUT, True, True),
        (End.CLOSED, True, True),
        (End.CLOSED, False, False),
        (End.LEFT, True, False),
    ],
)
def test_what_is_wrong_without_an_answer(end: End, owed: bool, is_fault: bool) -> None:
    sending = WAITS if owed else WAITS._replace(owed=())
    made = attempt(0, 0, TARGET)._replace(sending=sending)
    assert (problem(made, Exchange((), end, 0.1)) is not None) is is_fault


LOAD: dict[str, Any] = {
    "id": "a", "epoch": 1, "running": 0, "waiting": 0, "prefill_tokens_queued": 0,
    "blocks_compressed": 0, "blocks_uncompressed": 0, "blocks_reserved_growth": 0,
    "blocks_lent": 0, "blocks_borrowed": 0, "blocks_total": 9, "blocks_free": 9,
}  # fmt: skip


def test_what_replicas_hold_is_summed() -> None:
    assert held([LOAD, LOAD]) == {}
    busy = {**LOAD, "running": 2, "blocks_free": 5}
    assert held([busy, LOAD, {**LOAD, "running": 1}]) == {"running": 3, "blocks_used": 4}


def test_engines_that_die_or_begin_anew_are_seen() -> None:
    before, other = {Life("a", 1)}, {**LOAD, "epoch": 2}
    assert changed(before, [Look(0, [LOAD]), Look(1, []), Look(2, [LOAD])]) is None
    assert changed(before, [Look(0, [LOAD]), Look(1, [])]) is not None
    assert changed(before, [Look(0, [LOAD]), Look(1, [other])]) is not None
    # One that has been replaced twice is seen too.
    assert changed(before, [Look(0, [other]), Look(1, [LOAD])]) is not None


async def test_idle_is_what_replicas_report_from_now_on() -> None:
    watch = _watching(LOAD)
    idle = asyncio.create_task(wait_until_idle(watch, 1, timeout_s=30))
    await asyncio.sleep(0)
    busy = {**LOAD, "waiting": 1}
    watch.looks += [Look(1.0, [LOAD]), Look(2.0, [busy]), *[Look(3.0, [LOAD])] * 3]
    assert await idle is None
    assert "hold {'running': 1}" in str(
        await wait_until_idle(_watching({**LOAD, "running": 1}), 1, 0.0)
    )
    assert "1 of 2 replicas" in str(await wait_until_idle(_watching(LOAD), 2, 0.0))
    # What was reported before does not count.
    assert await wait_until_idle(_watching(LOAD), 1, 0.0) is not None


def _watching(load: dict[str, Any]) -> OccupancyWatch:
    watch = OccupancyWatch()
    watch.looks += [Look(0.0, [load])] * 5
    return watch


def test_no_request_is_larger_than_a_deployment_takes_at_once() -> None:
    # One of them had a value of a megabyte in each of five thousand members that were the same.
    for number in (*range(300), *range(3380, 3400), 3614):
        sent = attempt(7, number, TARGET).sending.pieces
        assert sum(map(len, sent)) < 64 << 20


async def test_a_deployment_that_is_gone_ends_the_run_and_fills_no_memory() -> None:
    campaign = Campaign(f"http://127.0.0.1:{free_port()}", limit_s=5)
    await campaign.send(TARGET, 3, range(100_000), 4)
    assert campaign.stopped is not None
    assert 200 <= campaign.fault_count < 300
    assert len(campaign.faults) == 200


async def test_a_fault_names_the_request_that_shows_it_again() -> None:
    """Every request that has a field gets a 500: the faults are exactly those."""
    made = {number: attempt(3, number, TARGET) for number in range(60)}
    bad = b"HTTP/1.1 500 X\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    good = OK.replace(b"200 OK", b"200 OK\r\nconnection: close")

    def serve(connection: socket.socket) -> None:
        data = connection.recv(1 << 22)
        connection.sendall(bad if b"/tokenize" in data else good)

    done: list[Judged] = []
    with listening(serve) as url:
        campaign = Campaign(url, limit_s=5)
        await campaign.send(TARGET, 3, made, 2, done.append)
        (first, *_) = [fault for fault in campaign.faults if fault.problem == "status 500"]
        again = Campaign(url, limit_s=5)
        await again.send(TARGET, first.attempt.seed, [first.attempt.number], 1)
    assert len(done) == 60
    assert again.faults[0].attempt == first.attempt == made[first.attempt.number]
    assert f"seed 3 number {first.attempt.number} (/tokenize" in str(first)
    assert "status 500" in str(first)
    assert sum(sum(counter.values()) for counter in campaign.by_path.values()) == 60
    rows = list(table(campaign.by_path))
    assert "500" in rows[0]
    assert any(row.startswith("/tokenize") for row in rows)
