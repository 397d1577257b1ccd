"""HAProxy itself, with the configuration that Ray Serve writes and `configs/haproxy` changes."""

import http.client
import socket
import ssl
import stat
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import psutil
import pytest
import trustme

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.serving.http.haproxy_config import changed, main, make_private
from tests.serving.http.real_haproxy import (
    Proxy,
    error_of,
    running,
    serves_configuration,
    short_folder,
)


class Door(BaseHTTPRequestHandler):
    """Answers 200 to health checks and all else.

    It closes the connection at `/small/gone`, and sends clients elsewhere at `/small/moved`.
    """

    def do_GET(self) -> None:
        if self.path == "/small/gone":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        moved = self.path == "/small/moved"
        self.send_response(307 if moved else 200)
        if moved:
            self.send_header("location", f"http://{self.headers['host']}/small/here")
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


@pytest.mark.parametrize("knows_application", [True, False])
def test_without_a_door_the_answer_is_to_come_again(folder: Path, knows_application: bool) -> None:
    door = free_port() if knows_application else None
    path, own = serves_configuration(folder, door, port := free_port())
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
        moved = httpx.get(f"https://127.0.0.1:{port}/small/moved", verify=context)
        assert moved.headers["location"] == f"https://127.0.0.1:{port}/small/here"
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
