"""The backend on a Serve handle: its calls, and the translation of its failures."""

import asyncio
import contextlib
import pickle
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import aclosing
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from ray.exceptions import ActorUnavailableError, RayTaskError
from ray.serve._private.common import DeploymentID
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from adakv_serve.router.footprint import Footprint
from adakv_serve.serving.http.asgi import Message, Scope
from adakv_serve.serving.http.decoded import with_decoded
from adakv_serve.serving.http.door_settings import FrontDoorSettings
from adakv_serve.serving.http.failures import (
    NoReplica,
    Overloaded,
    ReplicaDown,
    ReplicaFault,
    ReplicaLost,
)
from adakv_serve.serving.http.key_limits import Limits
from adakv_serve.serving.ingress.deployment import (
    HandleBackend,
    refuse_limits_without_keys,
    refuse_open_door,
)
from adakv_serve.serving.ingress.footprints import Prediction
from adakv_serve.serving.ingress.sender import Sender


class Answer:
    """The result of a handle's call: items, then perhaps an error."""

    def __init__(self, items: list[Any], error: BaseException | None) -> None:
        self._items = iter(items)
        self._error = error
        self.cancelled = False

    def __aiter__(self) -> AsyncIterator[Any]:
        return self

    async def __anext__(self) -> Any:
        for item in self._items:
            return item
        raise self._error or StopAsyncIteration

    def __await__(self) -> Generator[None, None, None]:
        yield
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        self.cancelled = True


class Handle:
    """The part of a `DeploymentHandle` that the backend uses."""

    def __init__(self, *items: Any, error: BaseException | None = None) -> None:
        self.answer = Answer(list(items), error)
        self.asgi = self.ping = self
        self.called_with: tuple[Any, ...] = ()

    def options(self, **_: Any) -> "Handle":
        return self

    def remote(self, *args: Any) -> Answer:
        self.called_with = args
        return self.answer


NOT_THERE = ActorUnavailableError("gone", b"0" * 16)


def ended_with(code: grpc.StatusCode) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata())


class Predictor:
    """Predicts the same for all requests, and keeps the output lengths that it learns."""

    FOOTPRINT = Footprint(3, 2, 50, 20, ())

    def __init__(self) -> None:
        self.asked: list[tuple[str, bytes, Sender]] = []
        self.learnt: list[int] = []

    async def predict(self, path: str, body: bytes, sender: Sender) -> Prediction:
        self.asked.append((path, body, sender))
        return Prediction(self.FOOTPRINT, body.replace(b"two", b"three"), "kind", answers=2)

    def note_output(self, kind: str, tokens: int) -> None:
        assert kind == "kind"
        self.learnt.append(tokens)


START: Message = {"type": "http.response.start", "status": 200, "headers": []}
USAGE: Message = {"type": "http.response.body", "body": b'{"usage": {"completion_tokens": 17}}'}


def backend_of(
    handle: Any,
    predictor: Any = None,
    rests: Callable[[], bool] = lambda: False,
    routing: Any = None,
) -> HandleBackend:
    return HandleBackend(handle, predictor, rests, routing)


class Told:
    """A routing that keeps what it is told."""

    def __init__(self) -> None:
        self.news: list[tuple[str, str | None]] = []

    def answered(self, footprint: Footprint) -> None:
        self.news.append(("answered", footprint.booking))

    def ended(self, footprint: Footprint) -> None:
        self.news.append(("ended", footprint.booking))


@pytest.mark.parametrize("error", [None, ReplicaLost()])
async def test_routing_is_told_of_the_first_output_and_of_every_end(
    error: Exception | None,
) -> None:
    handle, told = Handle([START], [USAGE], error=error), Told()
    backend = backend_of(handle, Predictor(), routing=told)
    with contextlib.suppress(ReplicaLost):
        async for _ in backend.stream({"path": "/", "headers": []}, b""):
            assert [what for what, _ in told.news] == ["answered"]
    assert [what for what, _ in told.news][-1] == "ended"
    assert {booking for _, booking in told.news} == {handle.called_with[2].booking}


async def test_batches_arrive_pickled_or_not() -> None:
    backend = backend_of(Handle([START], pickle.dumps([USAGE])))
    assert [batch async for batch in backend.stream({"path": "/", "headers": []}, b"")] == [
        [START],
        [USAGE],
    ]


async def test_a_footprint_goes_along_and_the_output_length_is_learnt() -> None:
    handle, predictor = Handle([START], [USAGE]), Predictor()
    backend = backend_of(handle, predictor)
    scope = {"path": "/v1/completions", "headers": [(b"x-session-id", b"7")]}
    async for _ in backend.stream(scope, b"body"):
        assert predictor.learnt == []
    assert predictor.asked == [("/v1/completions", b"body", Sender(None, "7"))]
    sent_scope, body, footprint = handle.called_with
    assert (sent_scope, body) == (scope, b"body")
    assert footprint._replace(booking=None) == Predictor.FOOTPRINT
    # For each of two answers.
    assert predictor.learnt == [8]
    assert not handle.answer.cancelled


async def test_a_request_pays_for_its_prompt_and_its_answers() -> None:
    paid: list[int] = []
    scope: Scope = {"path": "/", "headers": []}
    async for _ in backend_of(Handle([START], [USAGE]), Predictor()).stream(
        scope, b"", paid.append
    ):
        pass
    assert (paid[0], sum(paid[1:])) == (Predictor.FOOTPRINT.prompt_tokens, 17)
    paid.clear()
    async for _ in backend_of(Handle([START])).stream(scope, b"x" * 400, paid.append):
        pass
    assert sum(paid) == 100


@pytest.mark.parametrize(
    "error",
    [
        BackPressureError(num_queued_requests=1, max_queued_requests=1),
        NOT_THERE,
        # A stopping replica cancels its calls.
        asyncio.CancelledError(),
    ],
)
async def test_a_request_that_no_replica_takes_pays_nothing(error: BaseException) -> None:
    paid: list[int] = []
    scope: Scope = {"path": "/", "headers": []}
    with pytest.raises((Overloaded, ReplicaDown, ReplicaLost, NoReplica)):
        async for _ in backend_of(Handle(error=error), Predictor()).stream(scope, b"", paid.append):
            pass
    assert paid == [Predictor.FOOTPRINT.prompt_tokens, -Predictor.FOOTPRINT.prompt_tokens]


@pytest.mark.parametrize("status", [400, 500])
async def test_a_request_that_a_replica_refuses_pays_nothing(status: int) -> None:
    paid: list[int] = []
    refused = [{**START, "status": status}, {"type": "http.response.body", "body": b"{}"}]
    async for _ in backend_of(Handle(refused), Predictor()).stream(
        {"path": "/", "headers": []}, b"", paid.append
    ):
        pass
    assert (paid[0], sum(paid)) == (Predictor.FOOTPRINT.prompt_tokens, 0)


async def test_a_request_pays_for_what_was_decoded_however_its_body_tells_it() -> None:
    paid: list[int] = []
    body: Message = {"type": "http.response.body", "body": b"data: {}\n\n"}
    handle = Handle([START], with_decoded([body], 1), with_decoded([body], 64))
    seen = [
        message
        async for batch in backend_of(handle, Predictor()).stream(
            {"path": "/", "headers": []}, b"", paid.append
        )
        for message in batch
    ]
    assert seen == [START, body, body]
    assert sum(paid) == Predictor.FOOTPRINT.prompt_tokens + 64


async def test_a_body_with_the_prompts_ids_goes_along_with_its_length() -> None:
    handle = Handle([START])
    scope = {"path": "/", "headers": [(b"content-length", b"3"), (b"a", b"b")]}
    async for _ in backend_of(handle, Predictor()).stream(scope, b"two"):
        pass
    sent, body, _ = handle.called_with
    assert (body, sent["headers"]) == (b"three", [(b"a", b"b"), (b"content-length", b"5")])


async def test_a_probe_does_not_wake_a_fleet_at_zero() -> None:
    rests = True
    handle = Handle(error=DeploymentUnavailableError(DeploymentID("Engine")))
    backend = backend_of(handle, rests=lambda: rests)
    await backend.ping()
    # Replicas that are lost are no rest.
    rests = False
    with pytest.raises(NoReplica):
        await backend.ping()


async def test_a_refused_request_is_cancelled_and_overloaded() -> None:
    error = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    scope: Scope = {"path": "/", "headers": [(b"x-vllm-priority", b"3")]}
    with pytest.raises(Overloaded):
        await anext(backend_of(Handle(error=error)).stream(scope, b""))


async def test_without_a_predictor_no_footprint_goes_along() -> None:
    handle = Handle([START])
    async for _ in backend_of(handle).stream({"path": "/", "headers": []}, b""):
        pass
    assert handle.called_with == ({"path": "/", "headers": []}, b"", None)


async def test_an_answer_that_is_closed_early_is_cancelled_and_teaches_nothing() -> None:
    handle, predictor = Handle([START], [USAGE], [USAGE]), Predictor()
    scope: Scope = {"path": "/", "headers": []}
    async with aclosing(backend_of(handle, predictor).stream(scope, b"")) as batches:
        await anext(batches)
        await anext(batches)
    assert handle.answer.cancelled
    assert predictor.learnt == []


@pytest.mark.parametrize(
    ("error", "translated"),
    [(None, None), (ReplicaDown(), ReplicaDown), (NOT_THERE, ReplicaLost)],
)
async def test_a_ping_fails_as_a_stream_does(
    error: BaseException | None, translated: type[Exception] | None
) -> None:
    backend = backend_of(Handle(error=error))
    if translated is None:
        await backend.ping()
    else:
        with pytest.raises(translated):
            await backend.ping()


@pytest.mark.parametrize("reports", [True, False])
async def test_a_fleet_that_is_full_answers_by_its_reports(reports: bool) -> None:
    full = BackPressureError(num_queued_requests=1, max_queued_requests=1)
    routing = SimpleNamespace(has_fresh_report=reports)
    backend = backend_of(Handle(error=full), routing=routing)
    if reports:
        await backend.ping()
    else:
        with pytest.raises(Overloaded):
            await backend.ping()


def task_error(cause: Exception) -> Exception:
    return RayTaskError("asgi", "the traceback", cause).as_instanceof_cause()


async def raised_by_a_stream(error: BaseException) -> Exception:
    backend = backend_of(Handle(error=error))
    with pytest.raises(Exception) as raised:  # noqa: PT011
        await anext(backend.stream({"path": "/", "headers": []}, b""))
    return raised.value


@pytest.mark.parametrize(
    ("error", "translated"),
    [
        (BackPressureError(num_queued_requests=1, max_queued_requests=1), Overloaded),
        (NOT_THERE, ReplicaLost),
        (ended_with(grpc.StatusCode.UNAVAILABLE), ReplicaLost),
        (ended_with(grpc.StatusCode.CANCELLED), ReplicaLost),
        (RuntimeError("Unexpected error (StatusCode.UNAVAILABLE): closed."), ReplicaLost),
        (ReplicaLost("its engine died"), ReplicaLost),
        (task_error(ReplicaLost("its engine died")), ReplicaLost),
        (task_error(ReplicaDown("its engine is dead")), ReplicaDown),
    ],
)
async def test_failures_are_translated_by_their_kind(error: Exception, translated: type) -> None:
    assert type(await raised_by_a_stream(error)) is translated


@pytest.mark.parametrize(
    "error",
    [
        RecursionError("too deep"), KeyError("a"), RuntimeError("b"), ConnectionResetError("c"),
        ReplicaFault("d"), ended_with(grpc.StatusCode.UNKNOWN),
        ended_with(grpc.StatusCode.RESOURCE_EXHAUSTED),
        RuntimeError("Unexpected error (StatusCode.UNKNOWN): cannot unpickle."),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrap", [lambda error: error, task_error])
async def test_a_fault_in_a_replicas_code_is_not_its_loss(error: Exception, wrap: Any) -> None:
    raised = await raised_by_a_stream(wrap(error))
    assert isinstance(raised, type(error))
    assert not isinstance(raised, ReplicaLost)


async def test_a_call_of_a_replicas_to_another_actor_is_not_its_own_loss() -> None:
    assert not isinstance(await raised_by_a_stream(task_error(NOT_THERE)), ReplicaLost)


async def test_a_request_that_its_replica_cancels_is_lost() -> None:
    assert type(await raised_by_a_stream(asyncio.CancelledError())) is ReplicaLost


async def test_a_request_that_is_cancelled_here_stays_so() -> None:
    began = asyncio.Event()

    class Endless(Answer):
        async def __anext__(self) -> Any:
            began.set()
            await asyncio.Event().wait()

    handle = Handle()
    handle.answer = Endless([], None)
    stream = backend_of(handle).stream({"path": "/", "headers": []}, b"")
    asking = asyncio.ensure_future(anext(stream))
    await began.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert handle.answer.cancelled


async def test_a_missing_deployment_is_no_replica() -> None:
    error = DeploymentUnavailableError(DeploymentID("Engine", "llm"))
    assert isinstance(await raised_by_a_stream(error), NoReplica)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.9.9", "::1", "localhost", None])
def test_a_door_on_this_machines_own_address_may_be_open(host: str | None) -> None:
    refuse_open_door(host, is_meant=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.com", ""])
def test_an_open_door_to_others_must_be_meant(host: str) -> None:
    with pytest.raises(ValueError, match=r"auth\.keys_file.*auth\.open: true"):
        refuse_open_door(host, is_meant=False)
    refuse_open_door(host, is_meant=True)


def test_limits_need_keys() -> None:
    refuse_limits_without_keys(FrontDoorSettings())
    for settings in (
        FrontDoorSettings(limits=Limits(requests_at_once=1)),
        FrontDoorSettings(limits_by_key=(("alice", Limits()),)),
    ):
        with pytest.raises(ValueError, match="need API keys"):
            refuse_limits_without_keys(settings)


async def test_an_overload_keeps_its_time_to_wait() -> None:
    full = BackPressureError(num_queued_requests=1, max_queued_requests=1, retry_after_s=4.0)
    overloaded = await raised_by_a_stream(full)
    assert isinstance(overloaded, Overloaded)
    assert overloaded.retry_after_s == 4.0
