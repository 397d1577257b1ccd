"""Two Ray nodes on this machine, with an object store and a CPU each, until SIGINT or SIGTERM.

A second node whose raylet has died is ended and started again, as an operator's supervisor would.
"""

import re
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import httpx
from ray.cluster_utils import Cluster

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.processes import (
    in_own_shared_memory,
    ray_environment,
    started,
    wait_until_listening,
)

_LOOK_EVERY_S = 0.5


class Nodes(NamedTuple):
    address: str
    metrics_url: str


@contextmanager
def two_nodes(log_path: Path, shm_bytes: int | None = None) -> Iterator[Nodes]:
    """Run both nodes in a process of their own for the duration of the block.

    Args:
        shm_bytes: see `in_own_shared_memory`; None shares the machine's.
    """
    port, metrics_port = free_port(), free_port()
    # Ray puts Unix sockets below it, whose paths must be short.
    with TemporaryDirectory(prefix="akv", dir="/tmp") as folder:
        command = [
            sys.executable,
            "-m",
            "adakv_serve.loadtest.servers.two_nodes",
            str(port),
            str(metrics_port),
            folder,
        ]
        if shm_bytes is not None:
            command = in_own_shared_memory(command, shm_bytes)
        with started(command, ray_environment(), log_path) as process:
            wait_until_listening(port, process, log_path)
            yield Nodes(f"127.0.0.1:{port}", f"http://127.0.0.1:{metrics_port}/metrics")


def sent_bytes(metrics_url: str) -> float:
    """Return the bytes that the nodes' object managers sent to each other since their start."""
    exported = httpx.get(metrics_url, timeout=30).text
    line = r'^ray_object_manager_bytes\{.*Type="(?:PushedFromLocalPlasma|Received)".*\} ([\d.e+]+)'
    return sum(map(float, re.findall(line, exported, re.MULTILINE)))


def main(port: int, metrics_port: int, folder: str) -> None:
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "gcs_server_port": port, "num_cpus": 1,
            "include_dashboard": False, "metrics_export_port": metrics_port, "temp_dir": folder,
        },
    )  # fmt: skip
    second = cluster.add_node(num_cpus=1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        while True:
            if second.dead_processes():
                # With what is left of it. Its workers end once nothing has to wait for its raylet.
                cluster.remove_node(second, allow_graceful=False)
                second = cluster.add_node(num_cpus=1)
            time.sleep(_LOOK_EVERY_S)
    except KeyboardInterrupt:
        pass
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
