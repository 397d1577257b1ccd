"""A replica's answers to HTTP requests: its app's, with its name, its tokens and named failures."""

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from adakv_serve.serving.http.asgi import (
    ASGIApp,
    Message,
    Receive,
    Scope,
    Send,
    body_of,
    call_app,
    is_event_stream,
)
from adakv_serve.serving.http.decoded import Decoded, current_decoded, with_decoded
from adakv_serve.serving.http.encodable import unencodable_field
from adakv_serve.serving.http.failures import BackendFailure, ReplicaDown, ReplicaFault, ReplicaLost
from adakv_serve.serving.http.followed import BEGUN_WITH, tokens_message
from adakv_serve.serving.http.openai_error import error_messages
from adakv_worker.frontend.answer_tokens import AnswerTokens, current_answer_tokens
from adakv_worker.frontend.encodable import PROBLEM

REPLICA_HEADER = b"x-replica-id"
# How an event begins that tells of an error. Generated text cannot imitate it.
_ERROR = b'data: {"error"'


class ReplicaAnswers:
    """Plays requests to a replica's app."""

    def __init__(self, app: ASGIApp, is_dead: Callable[[], bool], replica_id: str) -> None:
        """
        Args:
            is_dead: returns whether the engine is gone, without which the app answers errors.
        """
        self._app = app
        self._is_dead = is_dead
        self._replica_id = replica_id

    async def answer(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        """Yield batches of ASGI response messages; closing the generator ends the request.

        Raises:
            ReplicaDown: the engine had died before.
            ReplicaLost: the engine has died.
            ReplicaFault: anything else went wrong.
        """
        if self._is_dead():
            raise ReplicaDown("the engine process has died")
        try:
            async with aclosing(self._batches(scope, body)) as batches:
                async for batch in batches:
                    yield batch
        except BackendFailure:
            raise
        except Exception as error:
            raise self._named(error) from None

    def _named(self, error: Exception) -> Exception:
        if self._is_dead():
            return ReplicaLost("the engine process died")
        return ReplicaFault.of(error)

    async def _batches(self, scope: Scope, body: bytes) -> AsyncGenerator[list[Message], None]:
        if (field := unencodable_field(body)) is not None:
            problem = f"{field or 'The request'} has {PROBLEM}."
            start, *rest = error_messages(400, problem, type_="BadRequestError", param=field)
            yield [self._signed(start), *rest]
            return
        answer = None if BEGUN_WITH not in scope else AnswerTokens(scope[BEGUN_WITH])
        decoded = Decoded(len(scope.get(BEGUN_WITH) or ()))
        sent_tokens = 0
        begun = False
        app = _followed(self._app, answer, decoded)
        async with aclosing(call_app(app, scope, body)) as batches:
            async for batch in batches:
                if self._is_dead() and _tells_error(batch):
                    raise ReplicaLost("the engine process died")
                if not begun:
                    begun = True
                    if not is_event_stream(batch[0]):
                        answer = None
                    batch[0] = self._signed(batch[0])
                tokens = answer.take() if answer is not None else None
                if tokens is not None:
                    batch = [tokens_message(tokens), *batch]
                if decoded.tokens > sent_tokens:
                    sent_tokens = decoded.tokens
                    batch = with_decoded(batch, sent_tokens)
                yield batch

    def _signed(self, start: Message) -> Message:
        """Return the response's start with a header that names this replica."""
        signature = (REPLICA_HEADER, self._replica_id.encode())
        return {**start, "headers": [*start.get("headers", ()), signature]}


def _followed(app: ASGIApp, answer: AnswerTokens | None, decoded: Decoded) -> ASGIApp:
    """Return an app whose requests to the engine are those of an answer."""

    async def following(scope: Scope, receive: Receive, send: Send) -> None:
        tokens = current_answer_tokens.set(answer)
        count = current_decoded.set(decoded)
        try:
            await app(scope, receive, send)
        finally:
            current_answer_tokens.reset(tokens)
            current_decoded.reset(count)

    return following


def _tells_error(batch: list[Message]) -> bool:
    return batch[0].get("status", 0) >= 500 or any(_ERROR in body_of(message) for message in batch)
