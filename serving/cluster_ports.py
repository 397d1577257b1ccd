"""Ports of a cluster that `make serve` starts, beside those that its configuration names.

Ray Serve has one number for each of them, and clusters of one machine that share it would answer
each other's requests. The first cluster has Serve's usual ports, each other one the next free ones.
"""

import errno
import socket
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, NamedTuple

# Serve's own defaults, by the variables that change them.
USUAL_PORTS = {
    "RAY_SERVE_HAPROXY_STATS_PORT": 8404,
    "RAY_SERVE_HAPROXY_METRICS_PORT": 9101,
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": 8500,
    "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": 9500,
}
# The ports of front doors, of which Serve takes the lowest first: from the first to below the last.
_DOORS = ("RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT", "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT")
_COUNT_OF_DOORS = 1000
DOOR_PORTS = range(30000, 30000 + _COUNT_OF_DOORS)
# First ports of other clusters' ranges. The kernel gives out those from 32768 on.
_OTHER_DOORS = (31000, *range(29000, 20000, -_COUNT_OF_DOORS))
# How many ports of a range are looked at, and how many numbers after a usual port.
_LOOKED_AT, _NEXT = 50, 100
_LOOPBACK = "127.0.0.1"
_HTTP_HOST, _HTTP_PORT, _STORE_PORT = "0.0.0.0", 8000, 6390


class PortTaken(RuntimeError):
    """A port that has to be this one cannot be opened."""


class _Needed(NamedTuple):
    """A port that the configuration or the environment names, and the setting that does."""

    port: int
    host: str
    setting: str


class ClusterPorts:
    """Free ports for a cluster. Other clusters of this machine do not get them while this is open.

    variables: what Ray's environment needs for them.
    """

    def __init__(self, config: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        """
        Args:
            config: a configuration of `serve run`.
            environment: of the program that starts Ray. What it sets stays as it is.

        Raises:
            PortTaken: a port that the two name cannot be opened, or none is left.
        """
        self._held: list[socket.socket] = []
        for needed in _needed(config, environment):
            if problem := _problem(needed.host, needed.port):
                raise PortTaken(
                    f"port {needed.port} {problem}: set {needed.setting} to another one"
                )
        self.variables: dict[str, str] = {}
        host = _http(config)[0]
        for name, usual in USUAL_PORTS.items():
            if name not in environment:
                self.variables[name] = str(self._first(range(usual, usual + _NEXT), host, 1, name))
        if not any(name in environment for name in _DOORS):
            firsts = (DOOR_PORTS.start, *_OTHER_DOORS)
            first = self._first(firsts, host, _LOOKED_AT, _DOORS[0])
            self.variables |= zip(_DOORS, (str(first), str(first + _COUNT_OF_DOORS)), strict=True)

    @property
    def unusual(self) -> dict[str, str]:
        """Return the variables that differ from Serve's defaults."""
        usual = {**USUAL_PORTS, _DOORS[0]: DOOR_PORTS.start, _DOORS[1]: DOOR_PORTS.stop}
        return {name: port for name, port in self.variables.items() if int(port) != usual[name]}

    def _first(self, ports: Iterable[int], host: str, count: int, name: str) -> int:
        """Hold and return the first of the ports that is free, with so many from it on."""
        for port in ports:
            free = all(_problem(host, port + more) is None for more in range(count))
            if free and (holder := _hold(port)) is not None:
                self._held.append(holder)
                return port
        raise PortTaken(f"no port is free for {name}: set it")

    def __enter__(self) -> "ClusterPorts":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for holder in self._held:
            holder.close()


def _http(config: Mapping[str, Any]) -> tuple[str, int]:
    options = config.get("http_options") or {}
    return options.get("host") or _HTTP_HOST, options.get("port", _HTTP_PORT)


def _needed(config: Mapping[str, Any], environment: Mapping[str, str]) -> Iterator[_Needed]:
    host, port = _http(config)
    yield _Needed(port, host, "http_options.port")
    for application in config.get("applications", ()):
        store = (application.get("args") or {}).get("store") or {}
        if not store.keys() & {"url", "url_env"}:
            yield _Needed(store.get("port", _STORE_PORT), _LOOPBACK, "store.port")
    for name in USUAL_PORTS:
        if name in environment:
            yield _Needed(int(environment[name]), host, name)


def _problem(host: str, port: int) -> str | None:
    """Return why nothing could listen on a port, None if something can."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family):
            return None
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return "is in use"
        return f"cannot be opened ({error.strerror or error})"


def _hold(port: int) -> socket.socket | None:
    """Return what keeps a port from other clusters that are about to start; None if one has it."""
    # A name of Linux's abstract socket namespace goes with its process.
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        holder.bind(f"\0adakv-port-{port}")
    except OSError:
        holder.close()
        return None
    return holder
