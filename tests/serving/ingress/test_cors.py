"""Which answers scripts of other origins may read."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from starlette.middleware.cors import CORSMiddleware

from adakv_serve.serving.http.door_settings import FrontDoorSettings
from adakv_serve.serving.http.front_door import FrontDoor
from adakv_serve.serving.ingress.cors import with_cors
from tests.serving.http.scripted_backend import WHOLE, ScriptedBackend, chunk

UI = "http://ui.example"


def client(server: dict[str, Any], backend: ScriptedBackend, **settings: Any) -> httpx.AsyncClient:
    door = FrontDoor(backend, FrontDoorSettings(**settings), logging.getLogger("test"))
    transport = httpx.ASGITransport(with_cors(door, server))
    return httpx.AsyncClient(transport=transport, base_url="http://door", headers={"origin": UI})


def allowed(response: httpx.Response) -> set[str]:
    names = {name for name in response.headers if name.startswith("access-control-allow-")}
    return names - {"access-control-allow-methods", "access-control-allow-headers"}


@pytest.mark.parametrize(
    ("server", "expected"),
    [
        ({"allowed_origins": ["*"]}, {"access-control-allow-origin"}),
        ({"allowed_origins": [UI]}, {"access-control-allow-origin"}),
        (
            {"allowed_origins": [UI], "allow_credentials": True},
            {"access-control-allow-origin", "access-control-allow-credentials"},
        ),
        ({"allowed_origins": ["http://other.example"]}, set()),
        # vLLM's own default.
        ({"allowed_origins": []}, set()),
        ({}, set()),
    ],
)
@pytest.mark.parametrize("status", [200, 401, 404, 413, 415, 500, 503])
async def test_every_answer_allows_the_configured_origins(
    server: dict[str, Any], expected: set[str], status: int
) -> None:
    backend = ScriptedBackend([RuntimeError()] if status == 500 else [WHOLE], ping=TimeoutError())
    asks: dict[int, Callable[[httpx.AsyncClient], Awaitable[httpx.Response]]] = {
        200: lambda door: door.post("/v1/completions", content=b"a"),
        401: lambda door: door.get("/v1/models", headers={"authorization": "Bearer wrong"}),
        404: lambda door: door.get("/sleep"),
        413: lambda door: door.post("/v1/completions", content=b"too long"),
        415: lambda door: door.post("/v1/completions", headers={"content-encoding": "gzip"}),
        500: lambda door: door.post("/v1/completions", content=b"a"),
        503: lambda door: door.get("/health"),
    }
    async with client(server, backend, max_body_bytes=4, api_keys=("right",)) as door:
        door.headers["authorization"] = "Bearer right"
        response = await asks[status](door)
    assert response.status_code == status
    assert allowed(response) == expected


@pytest.mark.parametrize(("vary", "expected"), [(b"", "Origin"), (b"Accept", "Accept, Origin")])
async def test_the_apps_own_headers_are_not_added_twice(vary: bytes, expected: str) -> None:
    """vLLM's app has the same middleware."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-type", b"text/plain"), *([(b"vary", vary)] if vary else [])]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send(chunk(b"{}", more=False))

    inner = CORSMiddleware(answer, allow_origins=[UI])
    transport = httpx.ASGITransport(with_cors(inner, {"allowed_origins": [UI]}))
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as door:
        response = await door.get("/v1/models", headers={"origin": UI})
    assert response.headers.get_list("vary") == [expected]
    assert response.headers.get_list("access-control-allow-origin") == [UI]


async def test_a_preflight_request_reaches_no_engine_and_needs_no_key() -> None:
    backend = ScriptedBackend()
    async with client({"allowed_origins": ["*"]}, backend, api_keys=("key",)) as door:
        asked = {"access-control-request-method": "POST"}
        preflight = await door.options("/v1/completions", headers=asked)
        other = await door.options("/v1/completions")
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "*"
    assert other.status_code == 401
    async with client({}, backend, api_keys=("key",)) as door:
        assert (await door.options("/v1/completions", headers=asked)).status_code == 401
    assert backend.calls == []
