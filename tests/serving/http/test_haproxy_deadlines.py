"""Clients that are slow, silent or many, before the real HAProxy."""

import asyncio
import contextlib
import resource
import select
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

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

# Deadlines of the HAProxy of these tests, in seconds.
HEADERS, IDLE, CLIENT = 1, 2, 3
HALF = b"GET /small/v1/models HTTP/1.1\r\nhost: x\r\nx-long: "


class Door(NamedTuple):
    """A server that stands for the front door.

    go_on: has it send the second piece of its answer at `/small/stream`.
    """

    port: int
    go_on: threading.Event


@pytest.fixture(scope="module")
def door() -> Iterator[Door]:
    go_on = threading.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        size = 0
        while (message := await receive()).get("more_body"):
            size += len(message["body"])
        size += len(message.get("body", b""))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/small/stream":
            await send({"type": "http.response.body", "body": b"first", "more_body": True})
            await asyncio.to_thread(go_on.wait, 60)
        await send({"type": "http.response.body", "body": b"%d bytes" % size})

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield Door(listener.getsockname()[1], go_on)
    go_on.set()
    server.should_exit = True
    thread.join()


@contextmanager
def proxy_of(
    door: Door, *, headers_s: int = 60, open_files: int | None = None, **options: Any
) -> Iterator[Proxy]:
    port = free_port()
    with short_folder() as folder:
        options = {"timeout_client_s": CLIENT, "keep_alive_s": IDLE, **options}
        path, own = serves_configuration(folder, door.port, port, **options)
        deadline = {"ADAKV_HEADERS_TIMEOUT_S": str(headers_s)}
        with running(path, port, own, open_files=open_files, **deadline) as proxy:
            yield proxy


@pytest.fixture(scope="module")
def proxy(door: Door) -> Iterator[Proxy]:
    with proxy_of(door, headers_s=HEADERS, timeout_client_s=600) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def hasty(door: Door) -> Iterator[Proxy]:
    """As `proxy`, with a deadline for clients that neither send nor take anything."""
    with proxy_of(door, headers_s=HEADERS) as proxy:
        yield proxy


def connected(proxy: Proxy, sent: bytes = b"") -> socket.socket:
    link = socket.create_connection(("127.0.0.1", proxy.port), 60)
    link.sendall(sent)
    return link


def rest(link: socket.socket) -> bytes:
    """Return what comes until the connection ends."""
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := link.recv(65536):
            data += piece
    return data


@pytest.mark.parametrize("sent", [b"", HALF], ids=["nothing", "half"])
def test_headers_that_do_not_come_end_with_a_408(proxy: Proxy, sent: bytes) -> None:
    with connected(proxy, sent) as link:
        assert rest(link).startswith(b"HTTP/1.1 408 ")


def test_headers_that_drip_end_with_a_408(proxy: Proxy) -> None:
    with connected(proxy, HALF) as link:
        while not select.select([link], [], [], 0.1)[0]:
            link.sendall(b"x")
        assert rest(link).startswith(b"HTTP/1.1 408 ")


def test_an_idle_connection_ends_without_a_word(proxy: Proxy) -> None:
    with connected(proxy, HALF + b"\r\n\r\n") as link:
        assert rest(link).endswith(b"\r\n\r\n7\r\n0 bytes\r\n0\r\n\r\n")


def test_an_upload_goes_on_beyond_the_deadlines(hasty: Proxy) -> None:
    head = (
        b"POST /small/v1 HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
        b"transfer-encoding: chunked\r\n\r\n"
    )
    end_s = time.monotonic() + CLIENT + 2
    sent = 0
    with connected(hasty, head) as link:
        # Each pause is far below the deadlines, and all of them together are above.
        while time.monotonic() < end_s:
            link.sendall(b"1\r\nx\r\n")
            sent += 1
            assert not select.select([link], [], [], 0.05)[0]
        link.sendall(b"0\r\n\r\n")
        assert b"%d bytes" % sent in rest(link)


def test_a_stream_goes_on_beyond_the_deadlines(door: Door, hasty: Proxy) -> None:
    with httpx.stream("GET", f"{hasty.url}/small/stream", timeout=60) as stream:
        pieces = stream.iter_bytes()
        assert next(pieces) == b"first"
        # A client whose body stops is ended at the last of the deadlines.
        stopped = b"POST /small/v1 HTTP/1.1\r\nhost: x\r\ncontent-length: 60\r\n\r\n0123456789"
        with connected(hasty, stopped) as other:
            assert b" 200 " not in rest(other)
        door.go_on.set()
        assert b"".join(pieces) == b"0 bytes"


def _allow_open_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def test_1100_slow_clients_leave_room_for_others(door: Door) -> None:
    _allow_open_files(2000)
    with ExitStack() as links, proxy_of(door, timeout_client_s=60) as proxy:
        for _ in range(1100):
            links.enter_context(connected(proxy, HALF))
        assert httpx.get(f"{proxy.url}/small/v1", timeout=60).text == "0 bytes"


def test_with_too_many_connections_a_request_is_to_come_again(door: Door) -> None:
    with ExitStack() as links, proxy_of(door, timeout_client_s=60, maxconn=40) as proxy:
        for _ in range(37):
            links.enter_context(connected(proxy, HALF))
        response = httpx.get(f"{proxy.url}/small/v1", timeout=60)
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert error_of(response)["type"] == "ServiceUnavailable"


def test_it_starts_where_few_files_may_be_open(door: Door) -> None:
    with proxy_of(door, open_files=256) as proxy:
        assert httpx.get(f"{proxy.url}/small/v1", timeout=60).text == "0 bytes"
