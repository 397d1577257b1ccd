"""A ramp of users: `locust -f loadtest/locustfile.py,loadtest/shapes/ramp.py --ramp 1:32:300`."""

from argparse import ArgumentTypeError
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
        raise ArgumentTypeError("expected users at first:users at last:seconds") from None
    if min(plan) <= 0:
        raise ArgumentTypeError("users and seconds must be positive")
    return plan


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    parser.add_argument(
        "--ramp", type=_plan, default=_plan("1:16:120"), help="users at first:at last:seconds"
    )


class Ramp(LoadTestShape):
    def tick(self) -> tuple[int, float] | None:
        runner: Any = self.runner
        plan: Plan = runner.environment.parsed_options.ramp
        progress = self.get_run_time() / plan.seconds
        if progress >= 1:
            return None
        return round(plan.first + (plan.last - plan.first) * progress), 100.0
