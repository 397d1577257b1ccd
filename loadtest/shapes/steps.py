"""Steps of users: `locust -f loadtest/locustfile.py,loadtest/shapes/steps.py --steps 2,4,8:60`."""

from argparse import ArgumentTypeError
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
        raise ArgumentTypeError("expected users,users,…:seconds of each") from None
    if min(*plan.users, plan.seconds) <= 0:
        raise ArgumentTypeError("users and seconds must be positive")
    return plan


@events.init_command_line_parser.add_listener
def _add_options(parser: Any) -> None:
    parser.add_argument(
        "--steps", type=_plan, default=_plan("1,2,4,8:60"), help="users,users,…:seconds of each"
    )


class Steps(LoadTestShape):
    def tick(self) -> tuple[int, float] | None:
        runner: Any = self.runner
        plan: Plan = runner.environment.parsed_options.steps
        step = int(self.get_run_time() / plan.seconds)
        return (plan.users[step], 100.0) if step < len(plan.users) else None
