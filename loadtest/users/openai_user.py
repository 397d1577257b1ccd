"""A Locust user that streams from an OpenAI-compatible server and reports what it sees."""

import functools
import json
import time
from typing import Any

import gevent
from geventhttpclient import HTTPClient
from locust import User, task
from locust.exception import StopUser

from adakv_serve.loadtest.client.records import Record
from adakv_serve.loadtest.client.stream import StreamedAnswer
from adakv_serve.loadtest.traffic.load import Load
from adakv_serve.loadtest.traffic.workloads import Session, request_body
from adakv_serve.loadtest.users.load_test import LoadTest
from adakv_serve.loadtest.users.server import error_message, headers, path_at

_TIMEOUT_S = 1200.0


class OpenAIUser(User):
    """Runs one session after the other; in an open loop each at its time."""

    def on_start(self) -> None:
        self._test = LoadTest.of(self.environment)
        self._client = HTTPClient.from_url(
            str(self.host), connection_timeout=60, network_timeout=_TIMEOUT_S
        )

    def on_stop(self) -> None:
        self._client.close()

    @task
    def run_session(self) -> None:
        load = self._test.load
        if load is None:
            self._test.end()
            raise StopUser
        while load.must_wait():
            gevent.sleep(0.02)
        due = load.next_session()
        if due is None:
            self._end_if_over(load)
            raise StopUser
        try:
            self._run_turns(load, *due)
        finally:
            load.end_session()
        self._end_if_over(load)

    def _run_turns(self, load: Load, session: Session, at_s: float | None) -> None:
        late_s = 0.0
        if at_s is not None:
            gevent.sleep(max(0.0, at_s - load.elapsed_s()))
            late_s = load.elapsed_s() - at_s
        answers: list[str] = []
        for turn in range(len(session.turns)):
            if not load.begin_request():
                return
            answer, record = self._ask(load, session, turn, answers)
            record.late_s = round(late_s, 4) if turn == 0 else 0.0
            if load.end_request(record):
                self._report(record)
            if record.error is not None:
                return
            answers.append(answer)

    def _end_if_over(self, load: Load) -> None:
        """End the test after its last request, even if other users still wait for their time."""
        if load.is_over():
            self._test.end()

    def _ask(
        self, load: Load, session: Session, turn: int, answers: list[str]
    ) -> tuple[str, Record]:
        path, body = self._request(load, session, turn, answers)
        record = Record(session.session_id, turn, at_s=round(load.elapsed_s(), 4))
        started = time.perf_counter()
        answer = StreamedAnswer(started)
        try:
            record.error = self._stream(path, body, answer, record)
        except Exception as error:
            # Any failure of the server or the connection is the failure of this request alone.
            record.error = f"{type(error).__name__}: {error}"[:200]
        record.take(answer, time.perf_counter() - started)
        return answer.text, record

    def _request(
        self, load: Load, session: Session, turn: int, answers: list[str]
    ) -> tuple[str, dict[str, Any]]:
        path, body = request_body(session, turn, answers, load.model)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        options: Any = self.environment.parsed_options
        if not options.no_ignore_eos:
            body["ignore_eos"] = True
        if options.xargs:
            body["vllm_xargs"] = json.loads(options.xargs)
        return path, body

    def _stream(
        self, path: str, body: dict[str, Any], answer: StreamedAnswer, record: Record
    ) -> str | None:
        """Read a whole stream; return what was wrong with it."""
        where = path_at(str(self.host), path)
        response = self._client.request("POST", where, json.dumps(body), headers())
        replica: Any = response.get("x-replica-id")
        record.replica = replica
        if response.status_code != 200:
            return f"HTTP {response.status_code}: {error_message(bytes(response.read()))}"
        while line := response.readline(b"\n"):
            answer.take(bytes(line).decode(), time.perf_counter())
        if not answer.finished:
            return "the stream was cut"
        return None if answer.usage else "the stream has no usage"

    def _report(self, record: Record) -> None:
        """Write the record and fire Locust's events for its times."""
        self._test.write(record)
        options: Any = self.environment.parsed_options
        fire = functools.partial(
            self.environment.events.request.fire,
            name="trace" if options.trace else options.workload,
            context={},
            exception=RuntimeError(record.error) if record.error else None,
        )
        fire(
            request_type="E2E",
            response_time=record.e2e_s * 1000,
            response_length=record.output_tokens,
        )
        if record.error is not None:
            return
        times = [("TTFT", record.ttft_s), ("TPOT", record.tpot_s)]
        times += [("ITL", gap) for gap in record.itl_s]
        for kind, seconds in times:
            if seconds is not None:
                fire(request_type=kind, response_time=seconds * 1000, response_length=0)
