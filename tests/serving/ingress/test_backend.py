"""The backend on a Serve handle: what its failures are in the front door's terms."""

import logging
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serving.http.failures import NoReplica, Overloaded, ReplicaLost
from serving.http.front_door import FrontDoor, FrontDoorSettings
from serving.ingress.deployment import HandleBackend, with_cors


class FailingHandle:
    """As much of a `DeploymentHandle` as the backend uses; its calls fail with `error`."""

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.asgi = self.ping = self

    def options(self, **_: Any) -> "FailingHandle":
        return self

    async def remote(self, *_: Any) -> AsyncIterator[Any]:
        raise self._error
        yield


def task_error(cause: Exception) -> Exception:
    return RayTaskError("asgi", "the traceback", cause).as_instanceof_cause()


async def raised_by_a_stream(error: Exception) -> Exception:
    backend: Any = HandleBackend(FailingHandle(error), None)  # type: ignore[arg-type]
    with pytest.raises(Exception) as raised:  # noqa: PT011
        await anext(backend.stream({"path": "/"}, b""))
    return raised.value


@pytest.mark.parametrize(
    ("error", "translated"),
    [
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), Overloaded),
        (ActorUnavailableError("gone", b"0" * 16), ReplicaLost),
        (ConnectionResetError(), ReplicaLost),
        (RuntimeError("Unexpected error (StatusCode.UNKNOWN)"), ReplicaLost),
        (ReplicaLost("its engine died"), ReplicaLost),
        (task_error(ReplicaLost("its engine died")), ReplicaLost),
    ],
)
async def test_losses_are_told_from_overload(error: Exception, translated: type) -> None:
    assert type(await raised_by_a_stream(error)) is translated


@pytest.mark.parametrize("error", [RecursionError("too deep"), KeyError("a"), ValueError("b")])
@pytest.mark.parametrize("wrap", [lambda error: error, task_error])
async def test_a_fault_in_a_replica_is_no_loss_of_it(error: Exception, wrap: Any) -> None:
    raised = await raised_by_a_stream(wrap(error))
    assert isinstance(raised, type(error))
    assert not isinstance(raised, ReplicaLost)


async def test_a_missing_deployment_is_no_replica() -> None:
    error = DeploymentUnavailableError(DeploymentID("Engine", "llm"))
    assert isinstance(await raised_by_a_stream(error), NoReplica)


@pytest.mark.parametrize(
    ("server", "allowed"), [({"allowed_origins": ["http://ui.example"]}, True), ({}, False)]
)
async def test_the_doors_own_errors_allow_the_origins_that_answers_do(
    server: dict[str, Any], allowed: bool
) -> None:
    backend: Any = HandleBackend(FailingHandle(ValueError()), None)  # type: ignore[arg-type]
    door = FrontDoor(backend, FrontDoorSettings(max_body_bytes=1), logging.getLogger("test"))
    transport = httpx.ASGITransport(with_cors(door, server))
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        headers = {"origin": "http://ui.example"}
        response = await client.post("/v1/completions", content=b"long", headers=headers)
    assert response.status_code == 413
    assert ("access-control-allow-origin" in response.headers) is allowed
