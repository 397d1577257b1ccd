"""Two nodes in network namespaces of their own, with a firewall at the door of each.

Open are the ports that docs/multinode.md lists, and no others.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import psutil

from adakv_serve.router.stores import full_url
from tests.system.deployment import Deployment, spill_config

_HEAD, _WORKER = f"akv{os.getpid()}h", f"akv{os.getpid()}w"
_HEAD_IP, _WORKER_IP = "10.231.0.1", "10.231.0.2"
# The head's address for this process, and this process's for the head.
_DOOR_IP, _OUTSIDE_IP = "10.231.1.1", "10.231.1.2"
_RAY, _NODE_MANAGER, _OBJECT_MANAGER, _WORKERS = 6379, 6380, 6381, (10002, 10999)
_STORE, _HTTP, _SERVES_PROXY, _INGRESSES = 6390, 8000, 8500, (30000, 31000)
# What the kernel may choose, and so what replicas listen on for each other.
_CHOSEN = (20000, 21999)
_PASSWORD = "password-of-the-store"


def can_part() -> bool:
    """Whether this machine has what namespaces and firewalls take."""
    tools = all(shutil.which(tool) for tool in ("ip", "nft", "sysctl", "redis-server"))
    if not tools:
        return False
    try:
        _part()
    except AssertionError:
        return False
    finally:
        _unpart()
    return True


def _run(*command: str, check: bool = True) -> bool:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert not check or done.returncode == 0, f"{command}: {done.stderr}"
    return done.returncode == 0


def _within(namespace: str) -> tuple[str, ...]:
    """Return the command that runs another one in a namespace."""
    return ("ip", "netns", "exec", namespace)


class Firewalled(Deployment):
    """A head node and a worker, with a Redis on the head."""

    host, node_ip = _DOOR_IP, _HEAD_IP
    head, worker = _HEAD, _WORKER

    def __init__(self, **options: Any) -> None:
        super().__init__(**{**options, "ray_port": _RAY, "http_port": _HTTP, "store_port": _STORE})

    @property
    def store_url(self) -> str:
        return full_url(f"redis://:{_PASSWORD}@{_DOOR_IP}:{_STORE}")

    def _environment(self) -> dict[str, str]:
        return {
            **super()._environment(),
            "ADAKV_STORE_URL": f"redis://:{_PASSWORD}@{_HEAD_IP}:{_STORE}",
        }

    def _spawn(self, command: str, *args: str, within: Sequence[str] = ()) -> psutil.Popen:
        return super()._spawn(command, *args, within=within or _within(_HEAD))

    def _start_ray(self) -> None:
        _part()
        self._start_redis()
        ports = [
            f"--node-manager-port={_NODE_MANAGER}", f"--object-manager-port={_OBJECT_MANAGER}",
            f"--min-worker-port={_WORKERS[0]}", f"--max-worker-port={_WORKERS[1]}",
            "--num-cpus=1", "--block",
        ]  # fmt: skip
        self._spawn(
            "ray", "start", "--head", f"--port={_RAY}", f"--node-ip-address={_HEAD_IP}",
            "--include-dashboard=false", f"--temp-dir={self._folder.name}/ray",
            f"--metrics-export-port={self.metrics_port}", *ports,
        )  # fmt: skip
        self._spawn(
            "ray", "start", f"--address={_HEAD_IP}:{_RAY}", f"--node-ip-address={_WORKER_IP}",
            *ports, within=_within(_WORKER),
        )  # fmt: skip

    def _start_redis(self) -> None:
        redis = (
            "redis-server", "--port", str(_STORE), "--bind", _HEAD_IP, _DOOR_IP,
            "--requirepass", _PASSWORD, "--save", "",
        )  # fmt: skip
        self._processes.append(
            psutil.Popen(
                [*_within(_HEAD), *redis],
                stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
            )
        )  # fmt: skip

    def dropped(self) -> dict[str, int]:
        """How many connections the firewall of each node has not let in."""
        found = {}
        for name in (_HEAD, _WORKER):
            command = [*_within(name), "nft", "list", "ruleset"]
            listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            (packets,) = re.findall(r"counter packets (\d+) bytes \d+ drop", listed)
            found[name] = int(packets)
        return found

    def lets_in(self, port: int) -> bool:
        """Whether the worker reaches a port of the head."""
        connect = f"import socket; socket.create_connection(('{_HEAD_IP}', {port}), 3)"
        return _run(*_within(_WORKER), sys.executable, "-c", connect, check=False)

    def stop(self) -> None:
        try:
            super().stop()
        finally:
            _unpart()


def _part() -> None:
    _unpart()
    for name in (_HEAD, _WORKER):
        _run("ip", "netns", "add", name)
        _run("ip", "-n", name, "link", "set", "lo", "up")
        chosen = f"net.ipv4.ip_local_port_range={_CHOSEN[0]} {_CHOSEN[1]}"
        _run(*_within(name), "sysctl", "-w", chosen)
    _run(
        "ip", "link", "add", "akv0", "netns", _HEAD, "type", "veth",
        "peer", "name", "akv0", "netns", _WORKER,
    )  # fmt: skip
    _run("ip", "link", "add", "akv1", "netns", _HEAD, "type", "veth", "peer", "name", "akv1")
    for name, link, address in (
        (_HEAD, "akv0", _HEAD_IP), (_WORKER, "akv0", _WORKER_IP), (_HEAD, "akv1", _DOOR_IP)
    ):  # fmt: skip
        _run("ip", "-n", name, "addr", "add", f"{address}/24", "dev", link)
        _run("ip", "-n", name, "link", "set", link, "up")
    _run("ip", "addr", "add", f"{_OUTSIDE_IP}/24", "dev", "akv1")
    _run("ip", "link", "set", "akv1", "up")
    for name in (_HEAD, _WORKER):
        _run(*_within(name), "nft", _rules())


def _unpart() -> None:
    for name in (_HEAD, _WORKER):
        # Their links go with them.
        _run("ip", "netns", "del", name, check=False)


def _rules() -> str:
    ranges = ", ".join(f"{first}-{last}" for first, last in (_WORKERS, _INGRESSES, _CHOSEN))
    single = ", ".join(
        map(str, (_RAY, _NODE_MANAGER, _OBJECT_MANAGER, _STORE, _HTTP, _SERVES_PROXY))
    )
    return f"""
        table inet adakv {{
            chain from_nodes {{
                ct state established,related accept
                meta l4proto {{ icmp, ipv6-icmp }} accept
                tcp dport {{ {single}, {ranges} }} accept
                ct state new counter drop
                drop
            }}
            chain input {{
                type filter hook input priority 0; policy accept;
                iifname "akv0" jump from_nodes
            }}
        }}
    """


def firewalled_config(http_port: int, store_port: int) -> dict[str, Any]:
    """As `spill_config`, with doors on both nodes and a store that both reach."""
    config = spill_config(http_port, store_port)
    config["proxy_location"] = "EveryNode"
    config["http_options"]["host"] = "0.0.0.0"
    args = config["applications"][0]["args"]
    args["store"] = {"url_env": "ADAKV_STORE_URL"}
    args["ingress"] = {"count": 2}
    args["auth"] = {"api_keys_env": "ADAKV_API_KEYS"}
    return config
