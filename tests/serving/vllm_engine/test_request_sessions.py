"""What an HTTP request makes the engine do belongs to its tenant alone."""

import asyncio
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams

from adakv_worker.frontend.tenants import with_tenant
from adakv_worker.frontend.validator import RequestOptionsValidator
from adakv_worker.session_messages import TENANT_KEY
from serving.http.asgi import Receive, Scope, Send
from serving.http.tenants import TENANT_HEADER
from serving.vllm_engine.sessions import SessionMiddleware


async def _params_of(*tenants: bytes | None) -> list[SamplingParams]:
    """Return the sampling parameters of requests that are answered at the same time."""
    made = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0)
        params = made[scope["path"]] = SamplingParams(extra_args={"adakv_session": "auto"})
        with_tenant(params)

    async def nothing(*_: Any) -> Any:
        return {}

    door = SessionMiddleware(app)
    scopes = [
        {"type": "http", "path": index, "headers": [(TENANT_HEADER, name)] if name else []}
        for index, name in enumerate(tenants)
    ]
    await asyncio.gather(*(door(scope, nothing, nothing) for scope in scopes))
    return [made[index] for index in range(len(tenants))]


async def test_requests_at_the_same_time_keep_their_tenants() -> None:
    extra = [params.extra_args for params in await _params_of(b"a", None, b"b")]
    assert extra == [
        {"adakv_session": "auto", TENANT_KEY: "a"},
        {"adakv_session": "auto"},
        {"adakv_session": "auto", TENANT_KEY: "b"},
    ]


def test_a_request_cannot_name_its_tenant() -> None:
    params = SamplingParams(extra_args={TENANT_KEY: "other"})
    with pytest.raises(ValueError, match="cannot be set by requests"):
        RequestOptionsValidator.validate_params(params)
