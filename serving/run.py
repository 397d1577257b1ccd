"""`python -m serving.run CONFIG`: `serve run`, which at its end lets running requests finish.

SIGTERM and Ctrl-C shut the doors and wait for `replica.graceful_shutdown_timeout_s` at most; what
is left then ends with an error. A signal a second later, or more, ends everything at once.
"""

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from ray import serve
from ray._private.services import canonicalize_bootstrap_address
from ray.serve.scripts import run as serve_run

from adakv_serve.serving.cluster_ports import ClusterPorts, PortTaken
from adakv_serve.serving.config_sections import ReplicaConfig
from adakv_serve.serving.drain import drain
from adakv_serve.serving.shipped import CONFIGS
from adakv_serve.serving.start_report import StartReport
from adakv_serve.serving.stop_signals import StopSignals

# Longest time from the last answer to the end of Serve, in which doors stay shut.
_END_S = 60.0
# Longest wait for a connection to a cluster.
_CONNECT_S = 5.0


class ClusterGone(Exception):
    """There is no Ray cluster where there should be one."""


class NoConfiguration(Exception):
    """The file that is to be served has no configuration."""


def grace_s(config: dict[str, Any]) -> float:
    """Return the longest time that a configuration of `serve run` gives to running requests."""
    replicas = [
        application.get("args", {}).get("replica") or {}
        for application in config.get("applications", ())
    ]
    name = "graceful_shutdown_timeout_s"
    default = ReplicaConfig().graceful_shutdown_timeout_s
    return max((float(replica.get(name, default)) for replica in replicas), default=default)


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
    try:
        config = _read(args.config)
        address = _living_cluster(args.address) or "local"
        with _own_ports(config, address):
            _run(args.config, config, address)
    except (PortTaken, ClusterGone, NoConfiguration) as error:
        print(f"{args.config}: {error}", file=sys.stderr)
        return 1
    return 0


def _read(path: Path) -> dict[str, Any]:
    """Return a configuration of `serve run`.

    Raises:
        NoConfiguration: the file cannot be read, or has something else.
    """
    try:
        config = yaml.safe_load(path.read_text())
    except OSError as error:
        raise NoConfiguration(error.strerror) from error
    except (yaml.YAMLError, UnicodeError) as error:
        raise NoConfiguration(f"no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise NoConfiguration("no configuration of `serve run`; configs/cluster.yaml is one")
    return config


def _say(line: str) -> None:
    print(line, flush=True)


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
    _say(f"the Ray cluster that ran here last, at {found}, is gone: starting another")
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
            _say(f"Serve's usual ports are in use: {listed}")
        yield


def _run(path: Path, config: dict[str, Any], address: str) -> None:
    """Serve until the first signal to stop, and let running requests finish."""
    limit_s = grace_s(config)
    command = ["--address", address, "--non-blocking", str(path)]
    _say("starting Ray" if address == "local" else f"joining the Ray cluster at {address}")
    serve_run.main(command, standalone_mode=False)
    report = StartReport(config, lambda: serve.status().applications, _say)
    report.follow()
    StopSignals().wait()
    report.stop()
    _say(f"stopping: running requests have {limit_s:g} s; once more to stop at once")
    with contextlib.suppress(KeyboardInterrupt):
        drain(limit_s, _END_S, cut=True, tell=_say)
    serve.shutdown()  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    sys.exit(main())
