"""Locust users that stream from any OpenAI-compatible server.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --workload chat -u 8
    locust -f loadtest/locustfile.py --headless --host … -u 8 --requests 40 --records out.jsonl
    locust -f loadtest/locustfile.py,loadtest/shapes/steps.py …

With --master and --worker the counts and the rate are those of all workers together; each prints
and records its own.

Beside Locust's own figures (end to end) it reports TTFT, TPOT and ITL as requests of these types,
and output tokens as the response's size. A key comes from $OPENAI_API_KEY.
"""

import functools
import itertools
import json
import logging
import os
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gevent
from geventhttpclient import HTTPClient
from locust import User, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

# Takes seconds: a worker that began with it when told to start would miss its heartbeats.
from transformers import AutoTokenizer

# Locust loads this file by its path.
sys.path.insert(0, str(Path(__file__).parents[1]))

from loadtest.client.records import Limits, Record, summary
from loadtest.client.stream import StreamedAnswer
from loadtest.traffic.load import Load, Schedule
from loadtest.traffic.traces import read_trace
from loadtest.traffic.workloads import WORKLOADS, Session, Sizes, request_body, sessions
from serving.models.embedded import embedded_model_path

logger = logging.getLogger("loadtest")


@dataclass
class _Test:
    """What the process's users share. Locust gives them nothing but its Environment."""

    load: Load | None = None
    no_load_because: str | None = None
    is_over: bool = False


_test = _Test()

_TIMEOUT_S = 1200.0
# What a worker tells its master when it has nothing left to do.
_DONE = "adakv_done"


@events.init_command_line_parser.add_listener
def _add_options(parser: LocustArgumentParser) -> None:
    # Not as a group: the web UI shows only what the parser itself was given. It sends every option
    # back, by the type of its default: so none of these is None.
    add = parser.add_argument
    add("--workload", choices=list(WORKLOADS), default="long-document-qa")
    add("--trace", default="", help="replay this JSONL file instead (ours or Mooncake's format)")
    add("--trace-scale", type=float, default=0.0, help="factor on a trace's lengths (0: it fits)")
    add("--prompt-tokens", type=int, default=0, help="0: five eighths of the context")
    add("--output-tokens", type=int, default=0, help="0: an eighth of the context")
    add("--context-tokens", type=int, default=0, help="0: what the server says")
    add("--tokenizer", default="", help="folder or hub id (default: the model's, if it is local)")
    add("--model", default="", help="default: the server's first")
    add("--seed", type=int, default=0)
    add("--sessions", type=int, default=0, help="end after so many sessions, warm-up left out")
    add("--requests", type=int, default=0, help="end after so many requests, warm-up left out")
    add("--warmup", type=int, default=0, help="requests that are answered before the test begins")
    add("--rate", type=float, default=0.0, help="open loop: sessions a second, a Poisson process")
    add("--limit-ttft-s", type=float, default=0.0, help="of a request that counts for goodput")
    add("--limit-tpot-s", type=float, default=0.0)
    add("--records", default="", help="write a line of JSON for each request")
    add("--xargs", default="", help="JSON for vllm_xargs, such as '{\"adakv_budget_tokens\": 128}'")
    add("--no-ignore-eos", action="store_true", help="for servers that do not know ignore_eos")


@events.init.add_listener
def _init(environment: Environment, **_: Any) -> None:
    """In a process by itself, what is wrong with the options ends it before it starts."""
    if environment.web_ui is None and isinstance(environment.runner, LocalRunner):
        try:
            _test.load = _make_load(environment)
        except Exception as error:
            print(f"loadtest: {error}", file=sys.stderr)
            sys.exit(2)


@events.init.add_listener
def _listen(environment: Environment, **_: Any) -> None:
    """A master ends the test when all its workers are done."""
    runner = environment.runner
    if not isinstance(runner, MasterRunner):
        return
    done: set[str] = set()

    def note(environment: Environment, msg: Any, **_: Any) -> None:
        done.add(msg.node_id)
        if reason := msg.data["no_load_because"]:
            logger.error("worker %s: no test: %s", msg.node_id, reason)
            environment.process_exit_code = 2
        if len(done) >= runner.worker_count:
            done.clear()
            gevent.spawn(runner.quit if environment.web_ui is None else runner.stop)

    runner.register_message(_DONE, note)


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    """Makes the load anew for each test of the web UI, and in workers, which know it only now."""
    runner = environment.runner
    if isinstance(runner, MasterRunner):
        # Goes to the workers with the other options.
        vars(environment.parsed_options)["workers"] = runner.worker_count
        return
    if environment.web_ui is not None or isinstance(runner, WorkerRunner):
        _test.load = _test.no_load_because = None
        try:
            _test.load = _make_load(environment)
        except Exception as error:
            # The first user finds no load, and ends the test.
            _test.no_load_because = str(error)
            logger.error("no test: %s", error)
            if runner is not None and environment.web_ui is not None:
                runner.log_exception("local", f"no test: {error}", "")
    _test.is_over = False
    if _test.load is not None:
        _test.load.start()


def _make_load(environment: Environment) -> Load:
    """Raises ValueError or OSError for what cannot be done."""
    options: Any = environment.parsed_options
    if options.xargs:
        json.loads(options.xargs)
    card = _model_card(str(environment.host), options.model)
    context = options.context_tokens or card.get("max_model_len")
    if context is None:
        raise ValueError("the server does not tell its context: give --context-tokens")
    # What a chat template adds is not counted in the workloads.
    context -= 128
    tokenizer = _tokenizer(options.tokenizer, str(card.get("root")))
    index, workers = _place_among_workers(environment)
    # They ask for different things.
    seed = options.seed + 1000 * index
    warmup = _share(options.warmup, index, workers)
    if options.trace:
        if isinstance(environment.runner, WorkerRunner):
            raise ValueError("a trace is replayed by one process")
        trace = read_trace(Path(options.trace), tokenizer, context, options.trace_scale or None)
        schedule = Schedule.replay(trace)
    else:
        default = Sizes.of_context(context)
        sizes = Sizes(
            options.prompt_tokens or default.prompt_tokens,
            options.output_tokens or default.output_tokens,
        )
        endless = sessions(options.workload, tokenizer, context, sizes, seed)
        if options.sessions:
            mine = _share(options.sessions, index, workers)
            endless = itertools.islice(endless, warmup + mine)
        rate_per_s = options.rate / workers or None
        schedule = Schedule(endless, rate_per_s, random.Random(seed))
    requests = _share(options.requests, index, workers) if options.requests else None
    return Load(card["id"], schedule, warmup, requests)


def _place_among_workers(environment: Environment) -> tuple[int, int]:
    """This process's index and how many there are."""
    runner = environment.runner
    if not isinstance(runner, WorkerRunner):
        return 0, 1
    options: Any = environment.parsed_options
    return runner.worker_index, options.workers


def _share(total: int, index: int, workers: int) -> int:
    return total // workers + (index < total % workers)


def _model_card(host: str, wanted: str) -> dict[str, Any]:
    client = HTTPClient.from_url(host, connection_timeout=30, network_timeout=60)
    try:
        response = client.request("GET", "/v1/models", headers=_headers())
        body = response.read()
    finally:
        client.close()
    if response.status_code != 200:
        raise ValueError(f"/v1/models answers {response.status_code}: {_reason(bytes(body))}")
    cards = json.loads(bytes(body))["data"]
    for card in cards:
        if wanted in ("", card["id"]):
            return card
    known = ", ".join(card["id"] for card in cards)
    raise ValueError(f"the server has no model '{wanted}': it has {known}")


def _tokenizer(wanted: str, root: str) -> Any:
    if not wanted and Path(root).is_dir():
        wanted = root
    return AutoTokenizer.from_pretrained(wanted or embedded_model_path())


def _headers() -> dict[str, str]:
    headers = {"Content-Type": "application/json"}
    if key := os.environ.get("OPENAI_API_KEY"):
        headers["Authorization"] = f"Bearer {key}"
    return headers


def _reason(body: bytes) -> str:
    """What an error response says, shortly."""
    try:
        return str(json.loads(body)["error"]["message"])[:200]
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace")


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 5)


class OpenAIUser(User):
    """Takes one session after the other; in an open loop each at its time."""

    def on_start(self) -> None:
        self._client = HTTPClient.from_url(
            str(self.host), connection_timeout=60, network_timeout=_TIMEOUT_S
        )

    def on_stop(self) -> None:
        self._client.close()

    @task
    def run_session(self) -> None:
        load = _test.load
        if load is None:
            self._end_test()
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
        """The last one out ends the test: users that wait for a time of theirs go with it."""
        if load.is_over():
            self._end_test()

    def _end_test(self) -> None:
        if _test.is_over:
            return
        _test.is_over = True
        runner: Any = self.environment.runner
        if isinstance(runner, WorkerRunner):
            runner.send_message(_DONE, {"no_load_because": _test.no_load_because})
        else:
            gevent.spawn(runner.quit if self.environment.web_ui is None else runner.stop)

    def _ask(
        self, load: Load, session: Session, turn: int, answers: list[str]
    ) -> tuple[str, Record]:
        path, body = request_body(session, turn, answers, load.model)
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        options: Any = self.environment.parsed_options
        if not options.no_ignore_eos:
            body["ignore_eos"] = True
        if options.xargs:
            body["vllm_xargs"] = json.loads(options.xargs)
        record = Record(session.session_id, turn, at_s=round(load.elapsed_s(), 4))
        started = time.perf_counter()
        answer = StreamedAnswer(started)
        try:
            record.error = self._stream(path, body, answer, record)
        except Exception as error:
            # Whatever a server does, it is that request's failure and nothing else's.
            record.error = f"{type(error).__name__}: {error}"[:200]
        record.e2e_s = round(time.perf_counter() - started, 5)
        record.ttft_s, record.tpot_s = _rounded(answer.ttft_s), _rounded(answer.tpot_s)
        record.itl_s = [round(gap, 5) for gap in answer.itl_s]
        record.prompt_tokens, record.output_tokens = answer.prompt_tokens, answer.output_tokens
        record.cached_tokens, record.kv_compression = answer.cached_tokens, answer.proof
        return answer.text, record

    def _stream(
        self, path: str, body: dict[str, Any], answer: StreamedAnswer, record: Record
    ) -> str | None:
        """Reads a whole stream; returns what was wrong with it."""
        response = self._client.request("POST", path, json.dumps(body), _headers())
        replica: Any = response.get("x-replica-id")
        record.replica = replica
        if response.status_code != 200:
            return f"HTTP {response.status_code}: {_reason(bytes(response.read()))}"
        while line := response.readline(b"\n"):
            answer.take(bytes(line).decode(), time.perf_counter())
        if not answer.finished:
            return "the stream was cut"
        return None if answer.usage else "the stream told no usage"

    def _report(self, record: Record) -> None:
        options: Any = self.environment.parsed_options
        if options.records:
            worker, _ = _place_among_workers(self.environment)
            with open(f"{options.records}.{worker}" if worker else options.records, "a") as file:
                file.write(record.line() + "\n")
        name = "trace" if options.trace else options.workload
        exception = RuntimeError(record.error) if record.error else None
        fire = functools.partial(
            self.environment.events.request.fire, name=name, context={}, exception=exception
        )
        fire(
            request_type="E2E",
            response_time=record.e2e_s * 1000,
            response_length=record.output_tokens,
        )
        if exception is None:
            for kind, value in (("TTFT", record.ttft_s), ("TPOT", record.tpot_s)):
                if value is not None:
                    fire(request_type=kind, response_time=value * 1000, response_length=0)
            for gap in record.itl_s:
                fire(request_type="ITL", response_time=gap * 1000, response_length=0)


@events.quitting.add_listener
def _print_summary(environment: Environment, **_: Any) -> None:
    load = _test.load
    if load is None or not load.records:
        return
    options: Any = environment.parsed_options
    limits = None
    if options.limit_ttft_s or options.limit_tpot_s:
        limits = Limits(options.limit_ttft_s or None, options.limit_tpot_s or None)
    print(json.dumps(summary(load.records, limits)))
