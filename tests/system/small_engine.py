"""Serve deployments of the ingress' parts around an engine without a model, which fails as told."""

import asyncio
import json
import logging
import os
import signal
from collections.abc import AsyncGenerator
from contextlib import aclosing
from pathlib import Path
from typing import Any, NamedTuple

import httpx
from ray import serve
from ray.exceptions import ActorUnavailableError
from ray.serve.handle import DeploymentHandle

from adakv_serve.serving.http.asgi import Message, Receive, Scope, Send
from adakv_serve.serving.http.continued_streams import ContinuedStreams
from adakv_serve.serving.http.door_settings import FrontDoorSettings
from adakv_serve.serving.http.front_door import FrontDoor
from adakv_serve.serving.http.openai_error import error_messages
from adakv_serve.serving.http.replica_answers import ReplicaAnswers
from adakv_serve.serving.ingress.deployment import HandleBackend

SECRET = "xyzzy"
START: Message = {
    "type": "http.response.start", "status": 200,
    "headers": [(b"content-type", b"text/event-stream")],
}  # fmt: skip


class Unpicklable(Exception):
    """An exception that no other process can make again."""

    def __init__(self, one: str, two: int) -> None:
        super().__init__(one)
        self.lock = asyncio.Lock()


FAULTS: dict[str, Exception] = {
    "runtime": RuntimeError(SECRET),
    "broken pipe": BrokenPipeError(SECRET),
    "other actor": ActorUnavailableError(SECRET, b"0" * 16),
    "unpicklable": Unpicklable(SECRET, 2),
}


def _the_engines_code(error: Exception) -> None:
    raise error


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    """Do what the body says, once for each call: `steps[i]` at the call number i."""
    told = json.loads((await receive())["body"])
    calls = Path(told["calls"])
    with calls.open("a") as file:
        file.write(f"{os.getpid()}\n")
    steps = told["steps"]
    step = steps[min(len(calls.read_text().split()), len(steps)) - 1]
    if step.startswith("stream, "):
        await send(START)
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await asyncio.sleep(0.2)
        step = step.removeprefix("stream, ")
    if step == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    elif step == "cancel":
        raise asyncio.CancelledError
    elif step in FAULTS:
        _the_engines_code(FAULTS[step])
    for message in error_messages(200, "fine", type_="ok"):
        await send(message)


class SmallEngine:
    """Answers as a replica does."""

    def __init__(self) -> None:
        self._answers = ReplicaAnswers(_app, lambda: False, str(os.getpid()))

    async def asgi(
        self, scope: Scope, body: bytes, footprint: None = None
    ) -> AsyncGenerator[list[Message], None]:
        async with aclosing(self._answers.answer(scope, body)) as batches:
            async for batch in batches:
                yield batch

    async def ping(self) -> None:
        pass


class Answered(NamedTuple):
    status: int
    text: str
    log: str


class Asker:
    """Asks through a front door, in a process like an ingress'."""

    def __init__(self, engine: DeploymentHandle[Any]) -> None:
        self._logger = logging.getLogger("small")
        self._logger.setLevel(logging.INFO)
        backend = ContinuedStreams(HandleBackend(engine, None), self._logger)
        self._door = FrontDoor(backend, FrontDoorSettings(), self._logger)

    async def ask(self, told: dict[str, Any]) -> Answered:
        log = _Log()
        self._logger.addHandler(log)
        transport = httpx.ASGITransport(self._door)
        async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
            headers = {"x-request-id": "asked"}
            answer = await client.post("/v1/responses", json=told, headers=headers, timeout=60)
        self._logger.removeHandler(log)
        return Answered(answer.status_code, answer.text, "\n".join(log.lines))


class _Log(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(logging.Formatter().format(record))


def application(options: dict[str, Any]) -> serve.Application:
    """Return the application, with the Serve options of an ingress for the one who asks."""
    engine = serve.deployment(name="Engine", num_replicas=2, ray_actor_options={"num_cpus": 0})
    asker = serve.deployment(name="Asker", **options)
    return asker(Asker).bind(engine(SmallEngine).bind())
