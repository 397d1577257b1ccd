"""Locust users that stream from any OpenAI-compatible server.

    locust -f loadtest/locustfile.py --host http://127.0.0.1:8000 --workload chat -u 8
    locust -f loadtest/locustfile.py --headless --host … -u 8 --requests 40 --records out.jsonl
    locust -f loadtest/locustfile.py,loadtest/shapes/steps.py …

With --master and --worker the counts and the rate are those of all workers together; each prints
and records its own.

Beside Locust's own figures (end to end) it reports TTFT, TPOT and ITL as requests of these types,
and output tokens as the response's size. A key comes from $OPENAI_API_KEY.
"""

import json
import logging
import sys
from typing import Any

from locust import events
from locust.env import Environment
from locust.runners import LocalRunner, MasterRunner, WorkerRunner

from adakv_serve.loadtest.users.load_test import LoadTest, end_with_workers
from adakv_serve.loadtest.users.openai_user import OpenAIUser
from adakv_serve.loadtest.users.options import add_options

__all__ = ["OpenAIUser"]

logger = logging.getLogger("loadtest")

events.init_command_line_parser.add_listener(add_options)


@events.init.add_listener
def _init(environment: Environment, **_: Any) -> None:
    """Prepare a headless single process at once, so that a wrong option ends it with a reason."""
    end_with_workers(environment)
    if environment.web_ui is None and isinstance(environment.runner, LocalRunner):
        try:
            LoadTest.of(environment).prepare()
        except Exception as error:
            print(f"loadtest: {error}", file=sys.stderr)
            sys.exit(2)


@events.test_start.add_listener
def _start(environment: Environment, **_: Any) -> None:
    """Prepare each test of the web UI anew, and a worker's, which has its options only now."""
    runner = environment.runner
    if isinstance(runner, MasterRunner):
        # Goes to the workers with the other options.
        vars(environment.parsed_options)["workers"] = runner.worker_count
        return
    test = LoadTest.of(environment)
    if environment.web_ui is not None or isinstance(runner, WorkerRunner):
        try:
            test.prepare()
        except Exception as error:
            # The first user finds no load, and ends the test.
            logger.error("no test: %s", error)
            if runner is not None and environment.web_ui is not None:
                runner.log_exception("local", f"no test: {error}", "")
    test.begin()


@events.quitting.add_listener
def _print_summary(environment: Environment, **_: Any) -> None:
    if figures := LoadTest.of(environment).figures():
        print(json.dumps(figures))
