"""`python -m serving.run CONFIG`: `serve run`, which at its end lets running requests finish.

SIGTERM and Ctrl-C shut the doors and wait for `replica.graceful_shutdown_timeout_s` at most; what
is left then ends with an error. A second signal ends everything at once.
"""

import argparse
import contextlib
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from ray import serve
from ray.serve.scripts import run as serve_run

from serving.config_sections import ReplicaConfig
from serving.drain import drain

# Longest time from the last answer to the end of Serve, in which doors stay shut.
_END_S = 60.0


def grace_s(config: dict[str, Any]) -> float:
    """Return the longest time that a configuration of `serve run` gives to running requests."""
    replicas = [
        application.get("args", {}).get("replica") or {}
        for application in config.get("applications", ())
    ]
    name = "graceful_shutdown_timeout_s"
    default = ReplicaConfig().graceful_shutdown_timeout_s
    return max((float(replica.get(name, default)) for replica in replicas), default=default)


def _wait_for_signal() -> None:
    """Return at the first signal to stop. The next ones raise KeyboardInterrupt."""
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, on_signal)
    while not stop.wait(1.0):
        pass


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m serving.run", description=(__doc__ or "").split("\n", 1)[1]
    )
    parser.add_argument("config", type=Path, help="a configuration of `serve run`")
    parser.add_argument("-a", "--address", help="of a running Ray cluster; without it one starts")
    args = parser.parse_args()
    limit_s = grace_s(yaml.safe_load(args.config.read_text()))
    where = ["--address", args.address] if args.address else []
    serve_run.main([*where, "--non-blocking", str(args.config)], standalone_mode=False)
    _wait_for_signal()
    print(f"stopping: running requests have {limit_s:g} s; once more to stop at once", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        drain(limit_s, _END_S, cut=True, tell=lambda line: print(line, flush=True))
    serve.shutdown()  # type: ignore[no-untyped-call]
    return 0


if __name__ == "__main__":
    sys.exit(main())
