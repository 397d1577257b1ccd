"""What HAProxy answers to methods that nobody knows, and to what its door's server cannot parse."""

import socket
import threading
from collections.abc import Iterator

import httpx
import pytest
import uvicorn

from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.serving.http.asgi import Receive, Scope, Send
from tests.serving.http.real_haproxy import (
    Proxy,
    error_of,
    running,
    serves_configuration,
    short_folder,
)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Fail at `/small/fault`; answer with a 400 of its own, or with 200, once the body is there."""
    if scope["path"] == "/small/fault":
        raise RuntimeError("a fault")
    while (await receive()).get("more_body"):
        pass
    status = 400 if scope["path"] == "/small/own" else 200
    kind = [(b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": status, "headers": kind})
    await send({"type": "http.response.body", "body": b'"own"'})


@pytest.fixture(scope="module")
def proxy() -> Iterator[Proxy]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    port = free_port()
    with short_folder() as folder:
        path, own = serves_configuration(folder, listener.getsockname()[1], port)
        with running(path, port, own) as proxy:
            yield proxy
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize("method", ["PROPFIND", "TRACE", "X" * 200])
def test_unknown_methods_are_refused_with_those_that_are_known(proxy: Proxy, method: str) -> None:
    response = httpx.request(method, f"{proxy.url}/small/v1")
    assert response.status_code == 405
    assert "POST" in response.headers["allow"].split(", ")
    assert error_of(response)["code"] == 405


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_known_methods_pass(proxy: Proxy, method: str) -> None:
    assert httpx.request(method, f"{proxy.url}/small/v1").text == '"own"'


def test_a_request_that_the_doors_server_cannot_parse_gets_openais_error(proxy: Proxy) -> None:
    # HAProxy passes such a trailer on, and uvicorn answers in plain text.
    body = b"2\r\nab\r\n0\r\ncontent-length: 9\r\n\r\n"
    head = b"POST /small/v1 HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    with socket.create_connection(("127.0.0.1", proxy.port), 60) as link:
        link.sendall(head + body)
        start, _, text = link.recv(65536).partition(b"\r\n\r\n")
    status, *lines = start.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    response = httpx.Response(int(status.split()[1]), headers=headers, content=text)
    assert response.status_code == 400
    assert error_of(response)["type"] == "BadRequestError"


def test_a_fault_of_the_door_gets_openais_error(proxy: Proxy) -> None:
    response = httpx.get(f"{proxy.url}/small/fault")
    assert response.status_code == 500
    assert error_of(response)["type"] == "InternalServerError"


def test_errors_of_the_application_pass_as_they_are(proxy: Proxy) -> None:
    response = httpx.post(f"{proxy.url}/small/own")
    assert (response.status_code, response.text) == (400, '"own"')
