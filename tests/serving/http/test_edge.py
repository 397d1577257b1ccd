"""What Serve's HTTP servers do with requests and errors, behind our middleware."""

import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import uvicorn
from hypothesis import given
from hypothesis import strategies as st
from ray.serve._private.http_util import (
    RequestIdMiddleware,
    parse_disconnect_disabled_header,
    parse_request_timeout_header,
    parse_session_id_header,
)
from starlette.responses import PlainTextResponse, Response

from adakv_serve.serving.http.asgi import Receive, Scope, Send
from adakv_serve.serving.http.edge import middlewares
from tests.serving.http.scripted_backend import error_of

KNOWN = b"Abc-1.2:3_"


class App:
    """Answers with `response`, and remembers the request ids that it was given."""

    def __init__(self, response: Response) -> None:
        self._response = response
        self.ids: list[bytes] = []
        self.headers: list[tuple[bytes, bytes]] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.headers = scope["headers"]
        self.ids = [value for name, value in scope["headers"] if name == b"x-request-id"]
        await self._response(scope, receive, send)


def serve(app: Any) -> httpx.AsyncClient:
    """Return a client of an app behind Serve's middleware and ours, as Serve nests them."""
    app = RequestIdMiddleware(app)
    for middleware in middlewares():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://edge")


@given(given=st.lists(st.sampled_from([KNOWN, b"other"]) | st.binary(max_size=140), max_size=3))
@pytest.mark.asyncio
async def test_every_request_has_one_id_that_its_answer_has_too(given: list[bytes]) -> None:
    app = App(Response(b"{}", media_type="application/json"))
    headers = [(b"x-request-id", value) for value in given]
    response = await serve(app).get("/", headers=headers)
    (one,) = app.ids
    assert response.headers.get_list("x-request-id") == [one.decode()]
    assert one.isascii()
    assert 1 <= len(one) <= 128
    if given and given[0] in (KNOWN, b"other"):
        assert one == given[0]


async def test_serve_can_read_a_session_and_gets_no_orders_from_clients() -> None:
    app = App(Response(b"{}", media_type="application/json"))
    headers = [
        (b"X-Session-ID", "Zoë".encode("latin-1")), (b"x-request-timeout-seconds", b"\xff"),
        (b"x-request-disconnect-disabled", b"?1"), (b"serve_multiplexed_model_id", b"\xff"),
        (b"x-other", b"\xff"),
    ]  # fmt: skip
    await serve(app).get("/", headers=headers)
    given = dict(app.headers)
    assert parse_session_id_header(given) == "Zoë"
    assert parse_request_timeout_header(given, 7.0) == 7.0
    assert not parse_disconnect_disabled_header(given)
    assert given[b"x-other"] == b"\xff"
    assert b"serve_multiplexed_model_id" not in given


@pytest.mark.parametrize("status", [404, 408, 429, 500, 503])
async def test_an_error_in_plain_text_comes_in_openais_form(status: int) -> None:
    text = PlainTextResponse("no such path", status, {"retry-after": "3"})
    response = await serve(App(text)).get("/")
    error = error_of(response)
    assert (response.status_code, error["message"]) == (status, "no such path")
    assert response.headers["retry-after"] == "3"
    assert int(response.headers["content-length"]) == len(response.content)
    assert response.headers.get_list("content-type") == ["application/json"]
    assert response.headers["access-control-allow-origin"] == "*"


async def test_an_error_of_the_app_keeps_the_sites_that_may_read_it() -> None:
    named = PlainTextResponse("no", 404, {"access-control-allow-origin": "https://here"})
    response = await serve(App(named)).get("/")
    assert response.headers.get_list("access-control-allow-origin") == ["https://here"]


@pytest.mark.parametrize("answer", [
    PlainTextResponse("success", 200),
    Response(b'{"error": {}}', 400, media_type="application/json"),
    Response(b"", 404),
])  # fmt: skip
async def test_other_answers_pass_as_they_are(answer: Response) -> None:
    response = await serve(App(answer)).get("/")
    assert (response.status_code, response.content) == (answer.status_code, answer.body)


class _ReadsAhead:
    """Reads a request's body at once, as Serve does."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive()).get("more_body"):
            pass
        await Response(b"{}", media_type="application/json")(scope, receive, send)


@pytest.fixture
def reading_ahead(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The port of a server that takes bodies of 100 bytes at most."""
    monkeypatch.setenv("ADAKV_MAX_BODY_BYTES", "100")
    app: Any = _ReadsAhead()
    for middleware in middlewares():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()


@pytest.mark.parametrize(("length", "status"), [("100", 100), ("101", 413), ("9" * 18, 413)])
def test_who_waits_to_send_a_body_is_asked_for_it_only_if_it_is_taken(
    reading_ahead: int, length: str, status: int
) -> None:
    with socket.create_connection(("127.0.0.1", reading_ahead), 60) as link:
        head = f"content-length: {length}\r\nexpect: 100-continue\r\nx-request-id: one\r\n\r\n"
        link.sendall(b"POST / HTTP/1.1\r\nhost: x\r\n" + head.encode())
        answer = link.recv(65536)
        assert answer.startswith(b"HTTP/1.1 %d " % status)
        if status == 413:
            assert b"\r\nx-request-id: one\r\n" in answer
            assert b"\r\naccess-control-allow-origin: *\r\n" in answer
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 413
            # Else what comes next would be read as the body.
            assert link.recv(65536) == b""
