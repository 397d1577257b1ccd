"""The front door guards every route of vLLM's own app."""

import logging
from collections.abc import AsyncGenerator, Callable, Iterator

import httpx
import pytest
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.app import build_app

from adakv_serve.serving.http.asgi import Message, Scope
from adakv_serve.serving.http.door_settings import FrontDoorSettings
from adakv_serve.serving.http.front_door import FrontDoor
from adakv_serve.serving.http.paths import Paths
from adakv_serve.serving.vllm_engine.options import server_options

OPEN = {"/health", "/version"}
# Those of vLLM that the front door does not let through.
CLOSED = {
    "/inference/v1/abort_requests", "/is_scaling_elastic_ep", "/kv_event_sources", "/load",
    "/metrics", "/scale_elastic_ep",
}  # fmt: skip
TASKS = ("generate", "embed", "classify", "score", "transcription", "realtime")


class Untouched:
    """A backend that must not be reached."""

    async def stream(
        self, scope: Scope, body: bytes, pay: Callable[[int], None]
    ) -> AsyncGenerator[list[Message], None]:
        raise AssertionError(f"{scope['method']} {scope['path']} passed without a key")
        yield []

    async def ping(self) -> None: ...


def _routes(model: str) -> Iterator[tuple[str, str]]:
    options = server_options(model, "name", AsyncEngineArgs(model=model), {})
    app = build_app(options, TASKS)  # type: ignore[arg-type]
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), path
    for route in app.routes:
        for method in getattr(route, "methods", None) or ():
            yield method, getattr(route, "path", "/")


@pytest.fixture(scope="module")
def routes(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, str]]:
    found = _routes(str(tmp_path_factory.mktemp("model")))
    return sorted({(m, p) for m, p in found if m != "OPTIONS" and p not in OPEN})


async def test_without_a_key_every_route_is_401(routes: list[tuple[str, str]]) -> None:
    assert {"/v1/chat/completions", "/v1/models", "/tokenize", "/docs"} <= {p for _, p in routes}
    door = FrontDoor(Untouched(), FrontDoorSettings(("right",)), logging.getLogger("test"))
    transport = httpx.ASGITransport(door)
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        answers = {
            (method, path): (await client.request(method, path)).status_code
            for method, path in routes
        }
    assert set(answers.values()) == {401}, answers


def test_every_route_is_known_as_open_or_closed(routes: list[tuple[str, str]]) -> None:
    closed = {path for _, path in routes if not Paths().allow(path)}
    assert closed == CLOSED
