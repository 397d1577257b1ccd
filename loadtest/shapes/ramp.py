"""A ramp of users: `locust -f loadtest/locustfile.py,loadtest/shapes/ramp.py --ramp 1:32:300`."""

import sys
from typing import Any

from locust import LoadTestShape, events

from adakv_serve.loadtest.traffic import user_counts


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    # As text: the web UI makes a value of the default's type again.
    parser.add_argument("--ramp", default="1:16:120", help="users at first:at last:seconds")


@events.init.add_listener
def _check(environment: Any, **_: Any) -> None:
    try:
        user_counts.Ramp.parse(environment.parsed_options.ramp)
    except ValueError as error:
        print(f"loadtest: --ramp: {error}", file=sys.stderr)
        sys.exit(2)


class Ramp(LoadTestShape):
    """From the first number of users to the last in a straight line."""

    def tick(self) -> tuple[int, float] | None:
        runner: Any = self.runner
        ramp = user_counts.Ramp.parse(runner.environment.parsed_options.ramp)
        users = ramp.users(self.get_run_time())
        return None if users is None else (users, 100.0)
