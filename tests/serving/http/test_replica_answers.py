"""A replica's answers around its app: its name, its tokens, and what its failures are called."""

import pickle
from typing import Any

import pytest

from adakv_serve.serving.http.asgi import ASGIApp, Message, Receive, Scope, Send
from adakv_serve.serving.http.decoded import current_decoded, without_decoded
from adakv_serve.serving.http.failures import ReplicaDown, ReplicaFault, ReplicaLost
from adakv_serve.serving.http.followed import BEGUN_WITH, parted
from adakv_serve.serving.http.replica_answers import ReplicaAnswers
from adakv_worker.frontend.answer_tokens import current_answer_tokens
from tests.serving.http.scripted_backend import JSON_START, SSE_START, chunk

BROKEN = b'data: {"error": {"message": "EngineDeadError"}}\n\n'


class Engine:
    """An engine whose app sends one message after the other, or raises what is no message."""

    def __init__(self, *steps: Any) -> None:
        self.steps = steps
        self.dead = False
        self.tokens: list[int] = []

    async def app(self, scope: Scope, receive: Receive, send: Send) -> None:
        if (answer := current_answer_tokens.get()) is not None:
            self.tokens += answer.begun_with
            answer.follow(lambda: self.tokens)
        for step in self.steps:
            if callable(step):
                step()
            elif isinstance(step, Exception):
                raise step
            else:
                await send(step)

    def dies(self) -> None:
        self.dead = True

    def decodes(self, *tokens: int) -> Any:
        return lambda: self.tokens.extend(tokens)


async def answer(
    engine: Engine,
    body: bytes = b"{}",
    app: ASGIApp | None = None,
    scope: dict[str, Any] | None = None,
) -> list[list[Message]]:
    answers = ReplicaAnswers(app or engine.app, lambda: engine.dead, "replica-7")
    return [batch async for batch in answers.answer({"type": "http", **(scope or {})}, body)]


async def test_an_answer_names_its_replica() -> None:
    ((start, _),) = await answer(Engine(JSON_START, chunk(b"{}", more=False)))
    assert (b"x-replica-id", b"replica-7") in start["headers"]


@pytest.mark.parametrize("begun", [[], [7, 8]])
async def test_an_answer_tells_how_many_tokens_were_decoded_for_it(begun: list[int]) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        count = current_decoded.get()
        assert count is not None
        # The first output repeats what another engine has begun.
        count.note(len(begun))
        await send(SSE_START)
        for tokens in (1, 0, 5):
            count.note(tokens)
            await send(chunk(b"data: x\n\n", more=tokens < 5))

    scope = {BEGUN_WITH: begun} if begun else {}
    batches = await answer(Engine(), app=app, scope=scope)
    told = [without_decoded(batch) for batch in batches]
    assert [tokens for _, tokens in told if tokens is not None][-1] == 6
    assert all(one["type"].startswith("http.") for batch, _ in told for one in parted(batch)[0])


async def test_what_cannot_be_encoded_is_refused_before_the_app() -> None:
    ((start, body),) = await answer(Engine(AssertionError()), b'{"prompt": "\\ud83d"}')
    assert start["status"] == 400
    assert b"prompt" in body["body"]


class Secret(Exception):
    """An exception that cannot be pickled back."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one + two)


def fails_here() -> None:
    raise Secret("it is ", "so")


async def test_a_fault_travels_with_its_traceback() -> None:
    with pytest.raises(ReplicaFault) as raised:
        await answer(Engine(fails_here))
    arrived = pickle.loads(pickle.dumps(raised.value))
    assert isinstance(arrived, ReplicaFault)
    assert "in fails_here" in str(arrived)
    assert "Secret: it is so" in str(arrived)


@pytest.mark.parametrize("error", [RuntimeError("a"), OSError("b"), ConnectionResetError("c")])
async def test_no_error_of_the_app_is_a_loss(error: Exception) -> None:
    with pytest.raises(ReplicaFault):
        await answer(Engine(SSE_START, error))


async def test_a_request_to_a_dead_engine_does_nothing() -> None:
    engine = Engine(AssertionError())
    engine.dies()
    with pytest.raises(ReplicaDown):
        await answer(engine)


@pytest.mark.parametrize(
    "last",
    [
        [{**JSON_START, "status": 500}, chunk(b"{}", more=False)], [RuntimeError()],
        [SSE_START, chunk(BROKEN), chunk(b"data: [DONE]\n\n", more=False)],
    ],
)  # fmt: skip
async def test_an_error_because_the_engine_died_is_a_loss(last: list[Any]) -> None:
    engine = Engine()
    engine.steps = (engine.dies, *last)
    with pytest.raises(ReplicaLost) as raised:
        await answer(engine)
    assert type(raised.value) is ReplicaLost


async def test_an_error_of_a_living_engine_is_passed_on() -> None:
    ((_, event),) = await answer(Engine(SSE_START, chunk(BROKEN, more=False)))
    assert event["body"] == BROKEN


async def test_a_stream_that_is_followed_tells_its_tokens() -> None:
    engine = Engine()
    engine.steps = (engine.decodes(7, 8), SSE_START, chunk(b"data: {}\n\n", more=False))
    (batch,) = await answer(engine, scope={BEGUN_WITH: [5, 6]})
    messages, tokens = parted(batch)
    assert ([one["type"] for one in messages], tokens) == (
        ["http.response.start", "http.response.body"],
        [7, 8],
    )
    assert engine.tokens == [5, 6, 7, 8]


@pytest.mark.parametrize(("start", "scope"), [(JSON_START, {BEGUN_WITH: []}), (SSE_START, {})])
async def test_nothing_else_tells_tokens(start: Message, scope: dict[str, Any]) -> None:
    (batch,) = await answer(Engine(start, chunk(b"data: {}\n\n", more=False)), scope=scope)
    assert parted(batch) == (batch, None)


async def test_an_answer_of_several_requests_tells_no_tokens() -> None:
    engine = Engine(SSE_START, chunk(b"data: {}\n\n", more=False))

    async def twice(scope: Scope, receive: Receive, send: Send) -> None:
        answer = current_answer_tokens.get()
        assert answer is not None
        answer.follow(list)
        await engine.app(scope, receive, send)

    (batch,) = await answer(engine, app=twice, scope={BEGUN_WITH: []})
    assert parted(batch) == (batch, None)
