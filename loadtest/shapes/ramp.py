"""A ramp of users: `locust -f loadtest/locustfile.py,loadtest/shapes/ramp.py --ramp 1:32:300`."""

import sys
from typing import Any, NamedTuple

from locust import LoadTestShape, events


class Plan(NamedTuple):
    first: float
    last: float
    seconds: float


def _plan(text: str) -> Plan:
    try:
        plan = Plan(*map(float, text.split(":")))
    except (ValueError, TypeError):
        raise ValueError("expected users at first:users at last:seconds") from None
    if min(plan) <= 0:
        raise ValueError("users and seconds must be positive")
    return plan


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    # As text: the web UI makes a value of the default's type again.
    parser.add_argument("--ramp", default="1:16:120", help="users at first:at last:seconds")


@events.init.add_listener
def _check(environment: Any, **_: Any) -> None:
    try:
        _plan(environment.parsed_options.ramp)
    except ValueError as error:
        print(f"loadtest: --ramp: {error}", file=sys.stderr)
        sys.exit(2)


class Ramp(LoadTestShape):
    def tick(self) -> tuple[int, float] | None:
        runner: Any = self.runner
        plan = _plan(runner.environment.parsed_options.ramp)
        progress = self.get_run_time() / plan.seconds
        if progress >= 1:
            return None
        return round(plan.first + (plan.last - plan.first) * progress), 100.0
