"""Steps of users: `locust -f loadtest/locustfile.py,loadtest/shapes/steps.py --steps 2,4,8:60`."""

import sys
from typing import Any, NamedTuple

from locust import LoadTestShape, events


class Plan(NamedTuple):
    users: list[int]
    seconds: float


def _plan(text: str) -> Plan:
    try:
        users, seconds = text.split(":")
        plan = Plan([int(count) for count in users.split(",")], float(seconds))
    except ValueError:
        raise ValueError("expected users,users,…:seconds of each") from None
    if min(*plan.users, plan.seconds) <= 0:
        raise ValueError("users and seconds must be positive")
    return plan


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    # As text: the web UI makes a value of the default's type again.
    parser.add_argument("--steps", default="1,2,4,8:60", help="users,users,…:seconds of each")


@events.init.add_listener
def _check(environment: Any, **_: Any) -> None:
    try:
        _plan(environment.parsed_options.steps)
    except ValueError as error:
        print(f"loadtest: --steps: {error}", file=sys.stderr)
        sys.exit(2)


class Steps(LoadTestShape):
    def tick(self) -> tuple[int, float] | None:
        runner: Any = self.runner
        plan = _plan(runner.environment.parsed_options.steps)
        step = int(self.get_run_time() / plan.seconds)
        return (plan.users[step], 100.0) if step < len(plan.users) else None
