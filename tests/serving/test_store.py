"""The embedded store's server is started again after every failure but the first."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.router.stores import full_url, keep_url, private_folder
from adakv_serve.serving.config_sections import StoreConfig
from adakv_serve.serving.store import EmbeddedStore, start_valkey, store_url

PASSWORD = "s3cret-of-the-store"


class Starts:
    """Starts Valkey, except on the tries that are to fail."""

    def __init__(self) -> None:
        self.tries = 0
        self.failing: set[int] = set()
        self.servers: list[subprocess.Popen[bytes]] = []
        self.second = threading.Event()
        self.over = False

    def __call__(self, port: int, folder: str, password: str) -> subprocess.Popen[bytes]:
        if self.over:
            threading.Event().wait()
        self.tries += 1
        if self.tries in self.failing:
            raise OSError("no memory for a process")
        self.servers.append(start_valkey(port, folder, password))
        if len(self.servers) == 2:
            self.second.set()
        return self.servers[-1]


@pytest.fixture
def starts() -> Iterator[Starts]:
    starts = Starts()
    yield starts
    starts.over = True
    for server in starts.servers:
        server.kill()


def _answers(url: str) -> bool:
    retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 200)
    client = redis.Redis.from_url(url, retry=retry, retry_on_error=[redis.ConnectionError])
    return bool(client.ping())


def test_a_failed_restart_is_logged_and_tried_again(
    starts: Starts, caplog: pytest.LogCaptureFixture
) -> None:
    starts.failing = {2, 3}
    store = EmbeddedStore(free_port(), PASSWORD, starts)
    os.kill(starts.servers[0].pid, signal.SIGKILL)
    assert starts.second.wait(60)
    assert "no memory for a process" in caplog.text
    assert _answers(store.url())


@pytest.mark.parametrize("failing", [{1}, set()], ids=["cannot start", "port taken"])
def test_a_failure_at_first_is_an_error_with_the_way_out(starts: Starts, failing: set[int]) -> None:
    port, other = free_port(), Starts()
    if not failing:
        EmbeddedStore(port, PASSWORD, starts)
    other.failing = failing
    with pytest.raises(RuntimeError, match=r"store\.port or store\.url"):
        EmbeddedStore(port, PASSWORD, other)
    assert other.tries == 1


# A store as Ray's actor has it.
ACTOR = """
import sys
from adakv_serve.serving.store import EmbeddedStore
store = EmbeddedStore(int(sys.argv[1]), "password")
print(store.url(), flush=True)
sys.stdin.read()
"""


def test_a_killed_store_leaves_no_files(tmp_path: Path) -> None:
    port = free_port()
    actor = subprocess.Popen(
        [sys.executable, "-c", ACTOR, str(port)],
        env={**os.environ, "TMPDIR": str(tmp_path)}, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with actor:
        assert actor.stdout is not None
        url = actor.stdout.readline().decode().strip()
        assert full_url(f"redis://127.0.0.1:{port}") == url
        actor.kill()
    assert list(tmp_path.iterdir()) == []
    assert full_url(f"redis://127.0.0.1:{port}") != url
    # Its URL goes when the next one is kept.
    with keep_url(f"redis://:password@127.0.0.1:{free_port()}"):
        assert not (private_folder() / f"store-{port}.url").exists()


def test_only_who_has_its_url_gets_in(starts: Starts) -> None:
    port = free_port()
    store = EmbeddedStore(port, PASSWORD, starts)
    assert _answers(store.url())
    for stranger in (redis.Redis(port=port), redis.Redis(port=port, password="guess")):
        with pytest.raises(redis.AuthenticationError):
            stranger.ping()
    # All users can read command lines.
    command = Path(f"/proc/{starts.servers[0].pid}/cmdline").read_text()
    assert str(port) in command
    assert PASSWORD not in command
    assert full_url(f"redis://127.0.0.1:{port}") == store.url()


def test_the_url_may_come_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    config = StoreConfig(url_env="MY_STORE")
    monkeypatch.setenv("MY_STORE", "rediss://:secret@h:1\n")
    assert store_url(config) == "rediss://:secret@h:1"
    monkeypatch.setenv("MY_STORE", "redis://:se/cret@h:1")
    with pytest.raises(ValueError, match="MY_STORE cannot be read") as caught:
        store_url(config)
    assert "cret" not in str(caught.value)
    monkeypatch.delenv("MY_STORE")
    with pytest.raises(ValueError, match=r"store\.url_env names MY_STORE, which is not set"):
        store_url(config)
