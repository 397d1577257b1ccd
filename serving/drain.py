"""`python -m serving.drain`: refuse new requests, and wait until none runs.

Exits with 0 if nothing runs any more, and with 1 if something is left after the limit. The front
doors open again by themselves, a while after the command has ended.
"""

import argparse
import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve
from ray.serve.exceptions import RayServeException
from ray.serve.handle import DeploymentHandle

from adakv_serve.serving.http.draining import Running

logger = logging.getLogger("ray.serve")

# Longest time for all front doors of an application to answer.
_ANSWER_S = 10.0
_LOOK_S = 0.5
# What runs behind a front door that does not answer.
_UNKNOWN = Running("unknown, at a front door that does not answer,", _ANSWER_S)
# Requests named in the report of what is left.
_NAMED = 20


def drain(
    limit_s: float,
    hold_s: float,
    *,
    cut: bool = False,
    tell: Callable[[str], None] = print,
) -> list[Running]:
    """Have all front doors refuse new requests, and return what still runs at the limit.

    Args:
        hold_s: time after the return for which new requests are still refused.
        cut: end what is left at the limit, streams with an error event.
        tell: called with a line whenever the number of requests has changed.
    """
    doors = _doors()
    deadline, shown = time.monotonic() + limit_s, -1
    while True:
        left = [one for door in doors for one in _ask(door, "drain", _ANSWER_S + hold_s)]
        if len(left) != shown:
            shown = len(left)
            tell(f"{shown} requests run")
        if not left or time.monotonic() >= deadline:
            break
        time.sleep(_LOOK_S)
    if left and cut:
        for door in doors:
            _ask(door, "cut")
        tell(f"{shown} requests ended by force")
    for door in doors:
        _ask(door, "drain", hold_s)
    return left


def _doors() -> list[DeploymentHandle[Any]]:
    applications = serve.status().applications
    return [
        serve.get_deployment_handle("Ingress", name)
        for name, application in applications.items()
        if "Ingress" in application.deployments
    ]


def _ask(door: DeploymentHandle[Any], method: str, *args: float) -> list[Running]:
    """Return the answers of all front doors of an application, put together."""
    try:
        answers = door.broadcast(method, *args).results(timeout_s=_ANSWER_S, return_exceptions=True)
    except RayServeException as error:
        logger.warning("there is no front door: %s", error)
        return []
    except TimeoutError as error:
        answers = [error]
    left = []
    for answer in answers:
        if isinstance(answer, TimeoutError):
            left.append(_UNKNOWN)
        elif isinstance(answer, Exception):
            logger.warning("a front door is gone: %r", answer)
        else:
            left += answer or []
    return sorted(left, key=lambda one: -one.seconds)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serving.drain", description=(__doc__ or "").split("\n", 1)[1]
    )
    parser.add_argument("--address", default="auto", help="of the Ray cluster (auto)")
    parser.add_argument(
        "--limit-s", type=float, default=120.0, help="longest wait, in seconds (120)"
    )
    parser.add_argument(
        "--hold-s", type=float, default=60.0, help="how long doors stay shut afterwards (60)"
    )
    parser.add_argument(
        "--cut", action="store_true", help="end what is left at the limit with an error"
    )
    args = parser.parse_args()
    ray.init(address=args.address, namespace="serve", log_to_driver=False)
    left = drain(args.limit_s, args.hold_s, cut=args.cut)
    for request_id, seconds in left[:_NAMED]:
        print(f"request {request_id} has run for {seconds:.0f} s")
    if len(left) > _NAMED:
        print(f"and {len(left) - _NAMED} more")
    return 1 if left else 0


if __name__ == "__main__":
    sys.exit(main())
