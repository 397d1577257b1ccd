"""What an HTTP request makes the engine do belongs to its tenant alone."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from hypothesis import given
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from adakv_serve.serving.http.asgi import Receive, Scope, Send
from adakv_serve.serving.http.tenants import TENANT_HEADER
from adakv_serve.serving.vllm_engine.tenants import TenantMiddleware
from adakv_worker.config import CompressionConfig
from adakv_worker.frontend.tenants import with_tenant
from adakv_worker.frontend.validator import RequestOptionsValidator
from adakv_worker.salts import tenant_salt
from adakv_worker.session_messages import TENANT_KEY
from tests.serving.vllm_engine.worded import make_worded_model, words


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

    door = TenantMiddleware(app)
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


@given(texts=st.tuples(*[st.none() | st.text(alphabet="ab,'()\\ \ud800")] * 4))
def test_tenants_share_no_salt_whatever_their_requests_say(texts: tuple[str | None, ...]) -> None:
    one, its, other, others = texts
    if one is not None and other is not None and (one, its) != (other, others):
        assert tenant_salt(one, its) != tenant_salt(other, others)


def test_a_request_cannot_name_its_tenant() -> None:
    params = SamplingParams(extra_args={TENANT_KEY: "other"})
    with pytest.raises(ValueError, match="cannot be set by requests"):
        RequestOptionsValidator.validate_params(params)


@pytest_asyncio.fixture(
    loop_scope="module", scope="module", params=[False, True], ids=["stock", "compressing"]
)
async def client(
    request: pytest.FixtureRequest, in_process: None, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[httpx.AsyncClient]:
    from adakv_serve.serving.vllm_engine.host import VllmHost

    model = make_worded_model(tmp_path_factory.mktemp("worded"))
    options = {
        "dtype": "float32", "max_model_len": 1024, "block_size": 32, "enforce_eager": True,
        "kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 8,
    }  # fmt: skip
    told = {"enable_prompt_tokens_details": True}
    budget = CompressionConfig(budget_tokens=48, keep_ratio=0.0, window_tokens=16)
    host = await VllmHost.start(
        str(model), "tiny", options, told, budget if request.param else None
    )
    transport = httpx.ASGITransport(host.app)
    async with httpx.AsyncClient(transport=transport, base_url="http://replica") as client:
        yield client
    host.shutdown()


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("choices_of_the_first", [1, 2])
async def test_no_request_finds_another_tenants_prompt(
    client: httpx.AsyncClient, choices_of_the_first: int
) -> None:
    async def cached_tokens(tenant: bytes | None, choices: int = 1) -> int:
        prompt = words(200, first=choices_of_the_first)
        body = {"model": "tiny", "prompt": prompt, "max_tokens": 2, "n": choices}
        headers = {TENANT_HEADER: tenant} if tenant else {}
        answer = await client.post("/v1/completions", json=body, headers=headers, timeout=60)
        assert answer.status_code == 200, answer.text
        details = answer.json()["usage"]["prompt_tokens_details"]
        return int(details["cached_tokens"]) if details else 0

    await cached_tokens(b"a", choices_of_the_first)
    assert [await cached_tokens(tenant) for tenant in (None, b"b")] == [0, 0]
    assert await cached_tokens(b"a") > 0
