"""Steps of users: `locust -f loadtest/locustfile.py,loadtest/shapes/steps.py --steps 2,4,8:60`."""

import sys
from typing import Any

from locust import LoadTestShape, events

from adakv_serve.loadtest.traffic import user_counts


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    # As text: the web UI makes a value of the default's type again.
    parser.add_argument("--steps", default="1,2,4,8:60", help="users,users,…:seconds of each")


@events.init.add_listener
def _check(environment: Any, **_: Any) -> None:
    try:
        user_counts.Steps.parse(environment.parsed_options.steps)
    except ValueError as error:
        print(f"loadtest: --steps: {error}", file=sys.stderr)
        sys.exit(2)


class Steps(LoadTestShape):
    """One number of users after another, each for the same time."""

    def tick(self) -> tuple[int, float] | None:
        runner: Any = self.runner
        steps = user_counts.Steps.parse(runner.environment.parsed_options.steps)
        users = steps.users(self.get_run_time())
        return None if users is None else (users, 100.0)
