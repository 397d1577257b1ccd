"""Free ports are given out once on a machine."""

import random
import socket
import subprocess
import sys

import pytest

from adakv_serve.loadtest.servers.ports import free_port


@pytest.fixture
def three_ports() -> range:
    """Outside the default range: what one test has reserved stays so until the process ends."""
    while True:
        first = random.randrange(30000, 32000)
        ports = range(first, first + 3)
        if all(map(_is_free, ports)):
            return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def test_a_port_is_given_out_once(three_ports: range) -> None:
    assert sorted(free_port(three_ports) for _ in three_ports) == list(three_ports)
    with pytest.raises(RuntimeError, match="no free port"):
        free_port(three_ports)


def test_a_port_in_use_is_not_given_out(three_ports: range) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", three_ports[1]))
        found = {free_port(three_ports) for _ in range(2)}
    assert found == {three_ports[0], three_ports[2]}


def test_another_process_gets_another_port_until_this_one_ends(three_ports: range) -> None:
    program = (
        "from adakv_serve.loadtest.servers.ports import free_port\n"
        f"print(*(free_port({three_ports!r}) for _ in range(2)), flush=True)\n"
        "input()"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        theirs = set(map(int, other.stdout.readline().split()))
        mine = free_port(three_ports)
        assert {mine} == set(three_ports) - theirs
        with pytest.raises(RuntimeError):
            free_port(three_ports)
        other.stdin.write(b"\n")
    assert {free_port(three_ports) for _ in theirs} == theirs
