"""Streams whose replicas die, as their clients see them through the front door."""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

import httpx
import pytest

from adakv_serve.serving.http.asgi import Message, Scope
from adakv_serve.serving.http.continued_streams import ContinuedStreams
from adakv_serve.serving.http.door_settings import FrontDoorSettings
from adakv_serve.serving.http.failures import (
    NoReplica,
    Overloaded,
    ReplicaDown,
    ReplicaFault,
    ReplicaLost,
)
from adakv_serve.serving.http.followed import BEGUN_WITH, tokens_message
from adakv_serve.serving.http.front_door import FrontDoor
from tests.serving.http.scripted_backend import JSON_START, SSE_START, ScriptedBackend, chunk

# The text that each token adds. One is half a character, and adds nothing.
PIECES = ["Hel", "lo", "", "\u00e9", " world", ", and", " more", "."]
PROMPT = [900, 901]
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


class Run(NamedTuple):
    """What one replica does with a request.

    decodes: tokens after which the failure comes; None: all.
    ahead: decoded tokens whose text does not arrive any more.
    """

    decodes: int | None = None
    ahead: int = 0
    failure: Exception = ReplicaLost()


class Fleet:
    """Replicas that answer as vLLM does, the first one the first request, and so on."""

    def __init__(self, *runs: Run, **options: Any) -> None:
        """
        Args:
            options: ids: whether chunks have token ids. reasons: tokens of the answer's reasoning.
        """
        self.runs = list(runs)
        self.options = options
        self.begun: list[list[int] | None] = []
        self._created = 0

    async def ping(self) -> None: ...

    async def stream(
        self, scope: Scope, body: bytes, pay: Callable[[int], None]
    ) -> AsyncGenerator[list[Message], None]:
        begun = scope.get(BEGUN_WITH)
        self.begun.append(begun)
        self._created += 100
        run = self.runs[len(self.begun) - 1] if len(self.begun) <= len(self.runs) else Run()
        answer = _Answer(scope["path"], self._created, self.options)
        if run.decodes == 0 and not run.ahead:
            raise run.failure
        done = len(begun or ())
        end = len(PIECES) if run.decodes is None else done + run.decodes
        first = True
        while done < end:
            # The first output brings the tokens of elsewhere, too.
            at_once = range(0 if first else done, done + 1)
            events = answer.head() if first else b""
            events += answer.tokens(at_once)
            told = list(range(done, done + 1))
            if done + 1 == end:
                told = list(range(done, min(end + run.ahead, len(PIECES) - 1)))
            messages: list[Message] = [tokens_message(told)] if begun is not None else []
            messages += [dict(SSE_START)] if first else []
            yield [*messages, chunk(events)]
            first = False
            done += 1
        if run.decodes is not None:
            raise run.failure
        yield [chunk(answer.tail(), more=False)]


class _Answer:
    def __init__(self, path: str, created: int, options: dict[str, Any]) -> None:
        self._is_chat = path == CHAT
        self._created = created
        self._ids = options.get("ids", False)
        self._reasons = options.get("reasons", 0)

    def head(self) -> bytes:
        if not self._is_chat:
            return b""
        ids = {"prompt_token_ids": PROMPT} if self._ids else {}
        return self._event(self._choice({"role": "assistant", "content": ""}), **ids)

    def tokens(self, numbers: range) -> bytes:
        text = "".join(PIECES[number] for number in numbers if number >= self._reasons)
        thought = "".join(PIECES[number] for number in numbers if number < self._reasons)
        said: dict[str, Any] = {"reasoning": thought} if thought else {}
        said |= {"content": text} if text or not thought else {}
        choice = self._choice(said)
        if self._ids:
            choice["token_ids"] = [*numbers]
            if not self._is_chat and 0 in numbers:
                choice["prompt_token_ids"] = PROMPT
        if numbers[-1] + 1 == len(PIECES):
            choice["finish_reason"] = "length"
        return self._event(choice, usage={"completion_tokens": numbers[-1] + 1})

    def tail(self) -> bytes:
        usage = {"completion_tokens": len(PIECES), "prompt_tokens": len(PROMPT)}
        return self._event(None, usage=usage) + b"data: [DONE]\n\n"

    def _choice(self, said: dict[str, Any]) -> dict[str, Any]:
        own = {"delta": said} if self._is_chat else {"text": said["content"]}
        return {"index": 0, **own, "finish_reason": None}

    def _event(self, choice: dict[str, Any] | None, **more: Any) -> bytes:
        data = {
            "id": "cmpl-asked", "created": self._created,
            "choices": [] if choice is None else [choice], **more,
        }  # fmt: skip
        return b"data: " + json.dumps(data).encode() + b"\n\n"


async def ask(backend: Any, path: str = CHAT) -> httpx.Response:
    logger = logging.getLogger("test")
    door = FrontDoor(ContinuedStreams(backend, logger), FrontDoorSettings(), logger)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://d") as one:
        return await one.post(path, content=b"{}")


class Got(NamedTuple):
    """What a client makes of a stream."""

    texts: dict[str, str]
    roles: int
    ids: list[int]
    prompts: int
    heads: set[tuple[str, int]]
    finish: list[str]
    usage: dict[str, int]
    counts: list[int]
    done: int
    error: str | None


def got(response: httpx.Response) -> Got:
    texts: dict[str, str] = {}
    roles, prompts, done = 0, 0, 0
    ids: list[int] = []
    heads, finish, counts = set(), [], []
    usage: dict[str, int] = {}
    error = None
    for event in response.text.strip().split("\n\n"):
        if event == "data: [DONE]":
            done += 1
            continue
        data = json.loads(event.removeprefix("data: "))
        if "error" in data:
            error = data["error"]["type"]
            continue
        heads.add((data["id"], data["created"]))
        usage = data.get("usage", usage)
        prompts += "prompt_token_ids" in data
        for choice in data["choices"]:
            said = choice.get("delta", choice)
            roles += "role" in said
            for field in ("content", "reasoning", "text"):
                texts[field] = texts.get(field, "") + said.get(field, "")
            ids += choice.get("token_ids", ())
            prompts += choice.get("prompt_token_ids") is not None
            finish += [choice["finish_reason"]] if choice["finish_reason"] else []
            counts += [data["usage"]["completion_tokens"]] if "usage" in data else []
    return Got(texts, roles, ids, prompts, heads, finish, usage, counts, done, error)


@pytest.mark.parametrize("path", [CHAT, COMPLETION])
@pytest.mark.parametrize("options", [{}, {"ids": True}, {"reasons": 4}])
async def test_whenever_its_replica_dies_a_client_gets_the_same(
    path: str, options: dict[str, Any]
) -> None:
    if path == COMPLETION:
        options = {name: value for name, value in options.items() if name != "reasons"}
    undisturbed = got(await ask(Fleet(**options), path))
    moments = [(decodes, ahead) for decodes in range(1, len(PIECES)) for ahead in (0, 1, 2)]
    fleets = [Fleet(Run(*moment), **options) for moment in moments]
    answers = await asyncio.gather(*(ask(fleet, path) for fleet in fleets))
    for moment, answer in zip(moments, answers, strict=True):
        seen = got(answer)
        # Tokens may come together.
        assert sorted(set(seen.counts)) == seen.counts, moment
        assert seen.counts[-1] == len(PIECES)
        assert seen._replace(counts=[]) == undisturbed._replace(counts=[]), moment


async def test_the_next_replica_begins_with_the_tokens_that_were_told() -> None:
    fleet = Fleet(Run(3, ahead=1))
    await ask(fleet)
    assert fleet.begun == [[], [0, 1, 2, 3]]


async def test_it_goes_on_again_and_again_if_it_gets_on() -> None:
    fleet = Fleet(Run(2), Run(1), Run(3))
    assert got(await ask(fleet)).texts["content"] == "".join(PIECES)
    assert [len(begun or ()) for begun in fleet.begun] == [0, 2, 3, 6]


@pytest.mark.parametrize("failure", [ReplicaDown(), Overloaded(1.0), NoReplica()])
async def test_it_waits_for_a_replica_that_takes_it(failure: Exception) -> None:
    fleet = Fleet(Run(2), Run(0, failure=failure), Run(0, failure=failure))
    assert got(await ask(fleet)).finish == ["length"]


async def test_a_stream_that_kills_replicas_at_one_token_ends(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fleet = Fleet(Run(2), Run(0), Run(0), Run(0))
    seen = got(await ask(fleet))
    assert (seen.error, seen.done, len(fleet.begun)) == ("ReplicaLost", 0, 2)
    assert "does not go on" in caplog.text


async def test_a_fault_of_the_next_replica_is_one() -> None:
    seen = got(await ask(Fleet(Run(2), Run(0, failure=ReplicaFault("traceback")))))
    assert seen.error == "InternalServerError"


async def test_a_request_without_a_first_byte_is_retried_by_the_front_door() -> None:
    fleet = Fleet(Run(0))
    assert got(await ask(fleet)).finish == ["length"]
    assert fleet.begun == [[], []]


def event(choice: dict[str, Any], **more: Any) -> Message:
    data = {"id": "a", "created": 1, "choices": [{"index": 0, **choice}], **more}
    return chunk(b"data: " + json.dumps(data).encode() + b"\n\n")


SAID = event({"delta": {"content": "a"}})
TOLD = tokens_message([1])


@pytest.mark.parametrize(
    "first",
    [
        [dict(SSE_START), SAID],
        [TOLD, dict(SSE_START), event({"delta": {"tool_calls": [{"index": 0}]}})],
        [TOLD, dict(SSE_START), event({"index": 1, "delta": {"content": "a"}})],
        [TOLD, dict(SSE_START), event({"delta": {"content": "a"}, "finish_reason": "stop"})],
        [TOLD, dict(SSE_START), {**SAID, "body": SAID["body"][:-1]}],
    ],
    ids=["no tokens told", "in a tool call", "several choices", "ended", "half an event"],
)
async def test_what_cannot_go_on_ends_with_the_loss(first: list[Message]) -> None:
    backend = ScriptedBackend([first, ReplicaLost()], [[dict(SSE_START), SAID]])
    response = await ask(backend)
    assert json.loads(response.text.split("data: ")[-1])["error"]["type"] == "ReplicaLost"
    assert len(backend.calls) == 1


@pytest.mark.parametrize(
    "second",
    [
        [TOLD, dict(SSE_START), event({"delta": {"content": "b"}})],
        [{**JSON_START, "status": 400}, chunk(b"{}", more=False)],
    ],
    ids=["another text", "a refusal"],
)
async def test_an_answer_that_does_not_fit_is_not_sent(second: list[Message]) -> None:
    backend = ScriptedBackend([[TOLD, dict(SSE_START), SAID], ReplicaLost()], [second])
    response = await ask(backend)
    first, last = response.text.strip().split("\n\n")
    assert first.encode() + b"\n\n" == SAID["body"]
    assert json.loads(last.removeprefix("data: "))["error"]["type"] == "ReplicaLost"


async def test_a_tool_call_that_has_not_been_sent_follows_the_text() -> None:
    call = event({"delta": {"content": "ab", "tool_calls": [{"index": 0}]}})
    end = chunk(b"data: [DONE]\n\n", more=False)
    backend = ScriptedBackend(
        [[TOLD, dict(SSE_START), SAID], ReplicaLost()], [[TOLD, dict(SSE_START), call], [end]]
    )
    _, second, done = (await ask(backend)).text.strip().split("\n\n")
    (choice,) = json.loads(second.removeprefix("data: "))["choices"]
    assert choice["delta"] == {"content": "b", "tool_calls": [{"index": 0}]}
    assert done == "data: [DONE]"


async def test_an_error_of_the_next_replica_is_passed_on() -> None:
    error = chunk(b'data: {"error": {"type": "Mine"}}\n\n', more=False)
    backend = ScriptedBackend(
        [[TOLD, dict(SSE_START), SAID], ReplicaLost()], [[TOLD, dict(SSE_START), error]]
    )
    assert (await ask(backend)).text.endswith('data: {"error":{"type":"Mine"}}\n\n')


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/v1/models"])
async def test_other_endpoints_are_not_followed(path: str) -> None:
    backend = ScriptedBackend([[TOLD, dict(SSE_START), SAID], ReplicaLost()])
    await ask(backend, path)
    ((scope, _),) = backend.calls
    assert BEGUN_WITH not in scope


async def test_no_client_can_say_what_an_answer_begins_with() -> None:
    backend = ScriptedBackend([[JSON_START, chunk(b"{}", more=False)]])
    logger = logging.getLogger("test")
    door = FrontDoor(ContinuedStreams(backend, logger), FrontDoorSettings(), logger)
    headers = [(BEGUN_WITH.encode(), b"[7]")]
    scope = {
        "type": "http", "method": "POST", "path": CHAT, "headers": headers, BEGUN_WITH: [7],
        "query_string": BEGUN_WITH.encode() + b"=[7]",
    }  # fmt: skip
    incoming: asyncio.Queue[Message] = asyncio.Queue()
    body = json.dumps({BEGUN_WITH: [7]}).encode()
    incoming.put_nowait({"type": "http.request", "body": body})

    async def send(_: Message) -> None: ...

    await door(scope, incoming.get, send)
    assert backend.calls[0][0][BEGUN_WITH] == []
