"""The front door and API keys: who may pass, as whose tenant, and how much."""

import hashlib
import logging
from pathlib import Path

import pytest

from adakv_serve.serving.http.key_limits import Limits
from adakv_serve.serving.http.tenants import TENANT_HEADER
from tests.serving.http.scripted_backend import (
    WHOLE,
    Clock,
    ScriptedBackend,
    client,
    error_of,
    messages_of_the_door,
)

NAMED = [("alice", "old"), ("alice", "new"), ("bob", "other")]


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", "Basic right", "Bearer"])
async def test_a_missing_or_wrong_key_is_401(authorization: str | None) -> None:
    headers = {"authorization": authorization} if authorization else {}
    backend = ScriptedBackend()
    response = await client(backend, api_keys=("right",)).get("/v1/models", headers=headers)
    assert response.status_code == 401
    error = error_of(response)
    assert (error["type"], error["message"]) == ("AuthenticationError", "missing or wrong API key")
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.headers["content-type"] == "application/json"
    assert int(response.headers["content-length"]) == len(response.content)
    assert backend.calls == []


async def test_any_of_the_keys_opens_and_is_not_handed_on() -> None:
    backend = ScriptedBackend([WHOLE])
    headers = {"authorization": "Bearer two"}
    response = await client(backend, api_keys=("one", "two")).get("/v1/models", headers=headers)
    assert response.status_code == 200
    assert b"authorization" not in dict(backend.calls[0][0]["headers"])


async def test_keys_of_one_name_are_one_tenant_and_the_log_names_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    digests = [(name, hashlib.sha256(key.encode()).hexdigest()) for name, key in NAMED]
    (tmp_path / "keys").write_text("".join(f"{name} {digest}\n" for name, digest in digests))
    backend = ScriptedBackend(*[[WHOLE]] * 3)
    door = client(backend, keys_file=tmp_path / "keys")
    with caplog.at_level(logging.INFO):
        for _, key in NAMED:
            await door.get("/v1/models", headers={"authorization": f"Bearer {key}"})
    old, new, other = (dict(scope["headers"])[TENANT_HEADER] for scope, _ in backend.calls)
    assert old == new != other
    named = [message.split()[1] for message in messages_of_the_door(caplog)]
    assert named == ["key=alice", "key=alice", "key=bob"]


async def test_where_caches_are_shared_no_replica_learns_a_tenant() -> None:
    backend = ScriptedBackend([WHOLE])
    door = client(backend, api_keys=("one",), shares_caches=True)
    await door.get("/v1/models", headers={"authorization": "Bearer one"})
    assert TENANT_HEADER not in dict(backend.calls[0][0]["headers"])


async def test_a_key_that_has_used_its_tokens_waits_while_others_go_on() -> None:
    backend, clock = ScriptedBackend(*[[WHOLE]] * 3), Clock()
    backend.tokens = 90
    limits = Limits(tokens_per_minute=60)
    door = client(backend, clock, api_keys=("one", "two"), limits=limits)
    one, two = ({"authorization": f"Bearer {key}"} for key in ("one", "two"))
    assert (await door.post("/v1/completions", headers=one)).status_code == 200
    refused = await door.post("/v1/completions", headers=one)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "31")
    assert error_of(refused)["type"] == "RateLimitError"
    assert (await door.post("/v1/completions", headers=two)).status_code == 200
    clock.now += 31
    assert (await door.post("/v1/completions", headers=one)).status_code == 200
    assert len(backend.calls) == 3


async def test_a_replica_learns_the_tenant_and_never_from_the_client() -> None:
    backend = ScriptedBackend(*[[WHOLE]] * 4)
    door = client(backend, api_keys=("one", "two"))
    for key in ("one", "two", "one"):
        headers = {"authorization": f"Bearer {key}", "x-adakv-tenant": "forged"}
        assert (await door.get("/v1/models", headers=headers)).status_code == 200
    tenants = [dict(scope["headers"])[TENANT_HEADER] for scope, _ in backend.calls]
    assert tenants[0] == tenants[2] != tenants[1]
    assert not {b"forged", b"one", b"two"} & set(tenants)
    await client(backend).get("/v1/models", headers={"x-adakv-tenant": "forged"})
    assert TENANT_HEADER not in dict(backend.calls[-1][0]["headers"])
