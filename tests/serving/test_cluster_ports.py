"""Ports that clusters of one machine do not share, and what is said of those that are in use."""

import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.serving.cluster_ports import DOOR_PORTS, USUAL_PORTS, ClusterPorts, PortTaken

ROOT = Path(__file__).parents[2]


def config(**http: Any) -> dict[str, Any]:
    """A configuration with free ports."""
    options = {"host": "127.0.0.1", "port": free_port(), **http}
    store = {"port": free_port()}
    return {"http_options": options, "applications": [{"args": {"store": store}}]}


@pytest.fixture
def busy() -> Iterator[int]:
    """A port that another program listens on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def ports(variables: dict[str, str]) -> set[int]:
    return {int(variables[name]) for name in USUAL_PORTS}


def doors(variables: dict[str, str]) -> range:
    name = "RAY_SERVE_DIRECT_INGRESS_{}_HTTP_PORT"
    return range(int(variables[name.format("MIN")]), int(variables[name.format("MAX")]))


def test_clusters_that_start_at_once_share_no_port() -> None:
    with ExitStack() as stack:
        clusters = [stack.enter_context(ClusterPorts(config(), {})).variables for _ in range(4)]
    found = [port for cluster in clusters for port in ports(cluster)]
    assert len(set(found)) == 4 * len(USUAL_PORTS)
    starts = sorted(doors(cluster).start for cluster in clusters)
    ranges = [doors(cluster) for cluster in clusters]
    assert all(len(one) == len(DOOR_PORTS) for one in ranges)
    assert all(more - one >= len(DOOR_PORTS) for one, more in pairwise(starts))


def test_the_ports_of_a_cluster_that_runs_are_passed_over() -> None:
    with ClusterPorts(config(), {}) as first:
        taken = sorted(ports(first.variables))
        start = doors(first.variables).start
    with ExitStack() as servers:
        for port in (*taken, start):
            servers.enter_context(socket.create_server(("127.0.0.1", port)))
        with ClusterPorts(config(), {}) as second:
            assert not ports(second.variables) & set(taken)
            assert start not in doors(second.variables)
            assert set(second.unusual) == set(second.variables)
    # All others have ended.
    with ClusterPorts(config(), {}) as third:
        assert third.variables == first.variables


def test_what_the_environment_sets_stays() -> None:
    given = dict.fromkeys(USUAL_PORTS, str(free_port())) | {
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": "12000"
    }
    with ClusterPorts(config(), given) as ports:
        assert ports.variables == {}


def test_a_port_in_use_is_named_with_its_setting(busy: int) -> None:
    for given, environment, setting in (
        (config(port=busy), {}, r"http_options\.port"),
        ({**config(), "applications": [{"args": {"store": {"port": busy}}}]}, {}, r"store\.port"),
        (config(), {"RAY_SERVE_HAPROXY_STATS_PORT": str(busy)}, "RAY_SERVE_HAPROXY_STATS_PORT"),
    ):
        with pytest.raises(PortTaken, match=rf"port {busy} is in use: set {setting} to"):
            ClusterPorts(given, environment)


def test_no_port_is_asked_of_a_store_elsewhere(busy: int) -> None:
    store = {"url": "redis://elsewhere:6390", "port": busy}
    with ClusterPorts({**config(), "applications": [{"args": {"store": store}}]}, {}):
        pass


def test_a_port_that_cannot_be_opened_is_named_with_the_reason() -> None:
    # An address of no machine.
    with pytest.raises(PortTaken, match=r"cannot be opened \(Cannot assign"):
        ClusterPorts(config(host="192.0.2.1"), {})


def test_a_run_at_a_port_in_use_ends_with_one_line(busy: int, tmp_path: Path) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_text(yaml.safe_dump({**config(port=busy)}))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    ended = subprocess.run(
        [sys.executable, "-m", "adakv_serve.serving.run", str(path)],
        env=environment | {"RAY_TMPDIR": str(tmp_path)}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1:] == [
        f"{path}: port {busy} is in use: set http_options.port to another one"
    ]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", ["security.md", "multinode.md"])
def test_the_documents_list_the_usual_ports(name: str) -> None:
    text = (ROOT / "docs" / name).read_text()
    listed = {int(number) for number in re.findall(r"\b\d{4,5}\b", text)}
    assert {*USUAL_PORTS.values(), DOOR_PORTS.start, DOOR_PORTS.stop} <= listed
