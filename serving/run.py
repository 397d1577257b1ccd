"""`python -m serving.run CONFIG`: `serve run`, which at its end lets running requests finish.

SIGTERM and Ctrl-C shut the doors and wait for `replica.graceful_shutdown_timeout_s` at most; what
is left then ends with an error. A second signal ends everything at once.
"""

import argparse
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from ray import serve
from ray._private.services import canonicalize_bootstrap_address
from ray.serve.scripts import run as serve_run

from serving.cluster_ports import ClusterPorts, PortTaken
from serving.config_sections import ReplicaConfig
from serving.drain import drain
from serving.shipped import CONFIGS

# Longest time from the last answer to the end of Serve, in which doors stay shut.
_END_S = 60.0
# Longest wait for a connection to a cluster.
_CONNECT_S = 5.0


class ClusterGone(Exception):
    """There is no Ray cluster where there should be one."""


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
    parser.add_argument(
        "config", type=Path, nargs="?", default=CONFIGS / "cluster.yaml",
        help="a configuration of `serve run`; without it two small replicas on this machine",
    )  # fmt: skip
    parser.add_argument("-a", "--address", help="of a running Ray cluster; without it one starts")
    args = parser.parse_args()
    config = yaml.safe_load(args.config.read_text())
    try:
        address = _living_cluster(args.address) or "local"
        with _own_ports(config, address):
            _run(args.config, grace_s(config), address)
    except (PortTaken, ClusterGone) as error:
        print(f"{args.config}: {error}", file=sys.stderr)
        return 1
    return 0


def _living_cluster(address: str | None) -> str | None:
    """Return the address of the Ray cluster to run on; None to start one.

    Without an address Ray goes to the cluster that started here last, as a file says, also when
    that cluster was killed; it then waits for minutes.

    Raises:
        ClusterGone: nothing answers at an address that somebody has set.
    """
    # From the argument, RAY_ADDRESS or the file.
    found = canonicalize_bootstrap_address(address)  # type: ignore[arg-type]
    if found is None or _listens(found):
        return found
    if address is not None or os.environ.get("RAY_ADDRESS"):
        raise ClusterGone(f"no Ray cluster answers at {found}")
    print(f"the Ray cluster that ran here last, at {found}, is gone: starting another", flush=True)
    return None


def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S):
            return True
    except OSError:
        return False


@contextlib.contextmanager
def _own_ports(config: dict[str, Any], address: str) -> Iterator[None]:
    """Give Ray's environment ports of its own, if the run starts Ray.

    Raises:
        PortTaken: a port that has to be this one cannot be opened.
    """
    if address != "local":
        yield
        return
    with ClusterPorts(config, os.environ) as ports:
        os.environ.update(ports.variables)
        if ports.unusual:
            listed = " ".join(map("=".join, ports.unusual.items()))
            print(f"Serve's usual ports are in use: {listed}", flush=True)
        yield


def _run(config: Path, limit_s: float, address: str) -> None:
    """Serve until the first signal to stop, and let running requests finish."""
    command = ["--address", address, "--non-blocking", str(config)]
    serve_run.main(command, standalone_mode=False)
    _wait_for_signal()
    print(f"stopping: running requests have {limit_s:g} s; once more to stop at once", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        drain(limit_s, _END_S, cut=True, tell=lambda line: print(line, flush=True))
    serve.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    sys.exit(main())
