"""Ports for servers that a measurement or a test starts."""

import random
import socket
from collections.abc import Sequence

# Outside the range from which the kernel gives out ports itself.
PORTS = range(20000, 30000)


def free_port(ports: Sequence[int] = PORTS) -> int:
    """Reserve a port that is free now; no other caller on this machine gets it while we run.

    Raises:
        RuntimeError: every port is in use or reserved.
    """
    for port in random.sample(ports, len(ports)):
        if _reserve(port):
            return port
    raise RuntimeError(f"no free port from {ports[0]} to {ports[-1]}")


def _reserve(port: int) -> bool:
    # A name of Linux's abstract socket namespace: visible to all processes that share our ports,
    # and gone when we end, however that happens.
    name = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        name.bind(f"\0adakv-port-{port}")
        with socket.socket() as probe:
            probe.bind(("", port))
    except OSError:
        name.close()
        return False
    name.detach()
    return True
