"""The load test of one Locust process: made from the options, shared by its users."""

import itertools
import json
import logging
import random
from pathlib import Path
from typing import Any

import gevent
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner

# Takes seconds: a worker that imported it only when a test starts would miss its heartbeats.
from transformers import AutoTokenizer

from adakv_serve.loadtest.client.records import Limits, Record, summary
from adakv_serve.loadtest.traffic.load import Load, Schedule
from adakv_serve.loadtest.traffic.traces import read_trace
from adakv_serve.loadtest.traffic.workloads import Sizes, Tokenizer, sessions
from adakv_serve.loadtest.users.server import model_card
from adakv_serve.serving.models.embedded import embedded_model_path

logger = logging.getLogger("loadtest")

# The message of a worker to its master when it has nothing left to do.
DONE = "adakv_done"
# Tokens that a chat template adds, which the workloads do not count.
_TEMPLATE_TOKENS = 128


class LoadTest:
    """One process's load and how it ends.

    load: None until `prepare`. problem: why there is none.
    """

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._ended = False
        self.load: Load | None = None
        self.problem: str | None = None

    @classmethod
    def of(cls, environment: Environment) -> "LoadTest":
        """Return the environment's load test: Locust gives users nothing else to share."""
        return vars(environment).setdefault("adakv_load_test", cls(environment))

    def prepare(self) -> None:
        """Make a new load from the options.

        Raises:
            ValueError, OSError: the options or the server do not allow it.
        """
        self.load = self.problem = None
        try:
            self.load = _make_load(self._environment)
        except Exception as error:
            self.problem = str(error)
            raise

    def begin(self) -> None:
        """Start the clock of the load, if there is one."""
        self._ended = False
        if self.load is not None:
            self.load.start()

    def end(self) -> None:
        """End the test once: a worker reports to its master, other processes stop."""
        if self._ended:
            return
        self._ended = True
        runner: Any = self._environment.runner
        if isinstance(runner, WorkerRunner):
            runner.send_message(DONE, {"problem": self.problem})
        else:
            stop(self._environment)

    def figures(self) -> dict[str, Any] | None:
        """Return the summary of the records; None where there are none."""
        if self.load is None or not self.load.records:
            return None
        options: Any = self._environment.parsed_options
        limits = None
        if options.limit_ttft_s or options.limit_tpot_s:
            limits = Limits(options.limit_ttft_s or None, options.limit_tpot_s or None)
        return summary(self.load.records, limits)

    def write(self, record: Record) -> None:
        """Append a record to the file of --records; worker 1 and later write to their own."""
        options: Any = self._environment.parsed_options
        if not options.records:
            return
        worker, _ = _place_among_workers(self._environment)
        path = f"{options.records}.{worker}" if worker else options.records
        with open(path, "a") as file:
            file.write(record.line() + "\n")


def stop(environment: Environment) -> None:
    """Quit the process, or end only the test where the web UI may start another."""
    runner: Any = environment.runner
    # Not here: stopping waits for the users, one of which may be the caller.
    gevent.spawn(runner.quit if environment.web_ui is None else runner.stop)


def end_with_workers(environment: Environment) -> None:
    """Have a master end the test when all its workers are done."""
    runner = environment.runner
    if not isinstance(runner, MasterRunner):
        return
    done: set[str] = set()

    def note(environment: Environment, msg: Any, **_: Any) -> None:
        done.add(msg.node_id)
        if problem := msg.data["problem"]:
            logger.error("worker %s: no test: %s", msg.node_id, problem)
            environment.process_exit_code = 2
        if len(done) >= runner.worker_count:
            done.clear()
            stop(environment)

    runner.register_message(DONE, note)


def _make_load(environment: Environment) -> Load:
    options: Any = environment.parsed_options
    if options.xargs:
        json.loads(options.xargs)
    card = model_card(str(environment.host), options.model)
    context = options.context_tokens or card.get("max_model_len")
    if context is None:
        raise ValueError("the server does not report its context: give --context-tokens")
    context -= _TEMPLATE_TOKENS
    tokenizer = _tokenizer(options.tokenizer, str(card.get("root")))
    index, workers = _place_among_workers(environment)
    warmup = _share(options.warmup, index, workers)
    requests = _share(options.requests, index, workers) if options.requests else None
    if options.trace:
        if isinstance(environment.runner, WorkerRunner):
            raise ValueError("a trace is replayed by one process")
        trace = read_trace(Path(options.trace), tokenizer, context, options.trace_scale or None)
        schedule = Schedule.replay(trace)
    else:
        counted = _share(options.sessions, index, workers) if options.sessions else None
        most = None if counted is None else warmup + counted
        schedule = _schedule(options, tokenizer, context, index, workers, most)
    return Load(card["id"], schedule, warmup, requests)


def _schedule(
    options: Any, tokenizer: Tokenizer, context: int, index: int, workers: int, most: int | None
) -> Schedule:
    default = Sizes.of_context(context)
    sizes = Sizes(
        options.prompt_tokens or default.prompt_tokens,
        options.output_tokens or default.output_tokens,
    )
    # Workers ask different things.
    seed = options.seed + 1000 * index
    endless = sessions(options.workload, tokenizer, context, sizes, seed)
    return Schedule(
        itertools.islice(endless, most), options.rate / workers or None, random.Random(seed)
    )


def _place_among_workers(environment: Environment) -> tuple[int, int]:
    """Return this process's index and how many there are."""
    runner = environment.runner
    if not isinstance(runner, WorkerRunner):
        return 0, 1
    options: Any = environment.parsed_options
    return runner.worker_index, options.workers


def _share(total: int, index: int, workers: int) -> int:
    return total // workers + (index < total % workers)


def _tokenizer(wanted: str, root: str) -> Any:
    if not wanted and Path(root).is_dir():
        wanted = root
    return AutoTokenizer.from_pretrained(wanted or embedded_model_path())
