"""What an HTTP request makes the engine do belongs to its tenant alone."""

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from adakv_serve.serving.http.asgi import Receive, Scope, Send
from adakv_serve.serving.http.tenants import TENANT_HEADER
from adakv_serve.serving.vllm_engine.sessions import SessionMiddleware
from adakv_worker.frontend.tenants import with_tenant
from adakv_worker.frontend.validator import RequestOptionsValidator
from adakv_worker.salts import tenant_salt
from adakv_worker.session_messages import TENANT_KEY


def request(salt: str | None = None, extra: dict[str, Any] | None = None) -> EngineCoreRequest:
    return EngineCoreRequest(
        "request", [1, 2, 3], None, SamplingParams(extra_args=extra), None, 0.0, None, salt, None
    )


async def _requests_of(*tenants: bytes | None) -> list[EngineCoreRequest]:
    """Return requests that are answered at the same time."""
    made = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(0)
        made[scope["path"]] = one = request("salt", {"adakv_session": "auto"})
        with_tenant(one)

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
    first, open_, second = await _requests_of(b"a", None, b"b")
    extra = [one.sampling_params and one.sampling_params.extra_args for one in (first, second)]
    assert extra == [
        {"adakv_session": "auto", TENANT_KEY: "a"}, {"adakv_session": "auto", TENANT_KEY: "b"},
    ]  # fmt: skip
    assert open_ == request("salt", {"adakv_session": "auto"})
    # The ingress computes the same salts.
    assert [one.cache_salt for one in (first, open_, second)] == [
        tenant_salt("a", "salt"), "salt", tenant_salt("b", "salt"),
    ]  # fmt: skip


def test_a_request_that_goes_on_elsewhere_stays_its_tenants() -> None:
    moved = request(extra={TENANT_KEY: "a"})
    with_tenant(moved)
    assert moved.cache_salt == tenant_salt("a", None)


@given(texts=st.tuples(*[st.none() | st.text(alphabet="ab,'()\\ \ud800")] * 4))
def test_tenants_share_no_salt_whatever_their_requests_say(texts: tuple[str | None, ...]) -> None:
    one, its, other, others = texts
    if one is not None and other is not None and (one, its) != (other, others):
        assert tenant_salt(one, its) != tenant_salt(other, others)


def test_a_request_cannot_name_its_tenant() -> None:
    params = SamplingParams(extra_args={TENANT_KEY: "other"})
    with pytest.raises(ValueError, match="cannot be set by requests"):
        RequestOptionsValidator.validate_params(params)
