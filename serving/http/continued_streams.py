"""A backend whose streams go on at another replica when theirs is lost.

The ingress has the tokens of each stream. Another replica begins its answer with them and decodes
the rest; what the client has got of it is cut off.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from adakv_serve.serving.http.asgi import Message, Scope, body_of, header, is_event_stream
from adakv_serve.serving.http.backend import Backend
from adakv_serve.serving.http.failures import BackendFailure, ReplicaLost
from adakv_serve.serving.http.followed import BEGUN_WITH, parted
from adakv_serve.serving.http.retries import Continuations
from adakv_serve.serving.http.sent_answer import Differs, Rest, SentAnswer
from adakv_serve.serving.http.sse import data_of, split_events, with_data

# Endpoints whose chunks `SentAnswer` understands.
_PATHS = ("/v1/chat/completions", "/v1/completions")


def _pay_nothing(tokens: int) -> None:
    pass


class _Unfit(ReplicaLost):
    """Another replica's answer is not the rest of the stream."""


class ContinuedStreams:
    """A backend around another one."""

    def __init__(
        self,
        backend: Backend,
        logger: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._backend = backend
        self._logger = logger
        self._clock = clock

    async def ping(self) -> None:
        await self._backend.ping()

    async def stream(
        self, scope: Scope, body: bytes, pay: Callable[[int], None]
    ) -> AsyncGenerator[list[Message], None]:
        """Yield a response, from several replicas one after the other if streams are lost.

        Args:
            pay: called for what the first one computes; what is lost costs no client anything.

        Raises:
            BackendFailure: the answer cannot go on, or has not begun.
        """
        if scope["method"] != "POST" or not scope["path"].endswith(_PATHS):
            async with aclosing(self._backend.stream(scope, body, pay)) as batches:
                async for batch in batches:
                    yield batch
            return
        stream = _Stream()
        continuations = Continuations(self._clock)
        while True:
            followed = {**scope, BEGUN_WITH: list(stream.sent.tokens or ())}
            try:
                async with aclosing(self._backend.stream(followed, body, pay)) as batches:
                    async for batch in batches:
                        if messages := stream.take(batch):
                            yield messages
                return
            except BackendFailure as failure:
                if not stream.is_lost_by(failure):
                    raise
                pause_s = stream.pause_after(failure, continuations)
                name = header(scope, b"x-request-id").decode("latin-1")
                if pause_s is None:
                    self._logger.warning("request_id=%s does not go on: %s", name, failure)
                    raise ReplicaLost from failure
                self._logger.warning("request_id=%s goes on at another replica", name)
            await asyncio.sleep(pause_s)
            stream.go_on()
            pay = _pay_nothing


class _Stream:
    """One response on its way to the client."""

    def __init__(self) -> None:
        self.sent = SentAnswer()
        # Whether its start has been sent, which is one of a stream.
        self._is_stream = False
        # Set while a replica other than the first one answers.
        self._rest: Rest | None = None
        # The beginning of an event whose end has not come.
        self._part = b""

    def is_lost_by(self, failure: BackendFailure) -> bool:
        """Return whether a failure breaks a stream that has begun."""
        return self._is_stream and (self._rest is not None or isinstance(failure, ReplicaLost))

    def pause_after(self, failure: BackendFailure, continuations: Continuations) -> float | None:
        """Return the seconds to wait until it goes on; None if it cannot."""
        sent_in_part = self._part and self._rest is None
        tokens = self.sent.tokens
        if tokens is None or not self.sent.can_go_on or sent_in_part or isinstance(failure, _Unfit):
            return None
        return continuations.pause_after(failure, len(tokens))

    def go_on(self) -> None:
        """Expect the whole answer from another replica."""
        self._rest = self.sent.rest()
        self._part = b""

    def take(self, batch: list[Message]) -> list[Message]:
        """Return what the client gets of a replica's messages.

        Raises:
            _Unfit: the replica does not go on with the answer.
        """
        messages, tokens = parted(batch)
        self.sent.note_tokens(tokens)
        passed = [self._passed(message) for message in messages]
        return [message for message in passed if message is not None]

    def _passed(self, message: Message) -> Message | None:
        if message["type"] == "http.response.start":
            return self._start(message)
        if not self._is_stream or message["type"] != "http.response.body":
            return message
        events, part = split_events(self._part + body_of(message))
        if self._rest is None:
            # As it came, whole events or not.
            for event in events:
                self._note(event)
            self._part = part
            return message
        self._part = part
        body = b"".join(self._cut(event, self._rest) for event in events)
        return {**message, "body": body} if body or not message.get("more_body", False) else None

    def _start(self, message: Message) -> Message | None:
        if self._rest is None:
            self._is_stream = message["status"] == 200 and is_event_stream(message)
            return message
        if message["status"] != 200 or not is_event_stream(message):
            raise _Unfit(f"another replica answers with status {message['status']}")
        return None

    def _note(self, event: bytes) -> None:
        if (chunk := data_of(event)) is not None:
            self.sent.note(chunk)

    def _cut(self, event: bytes, rest: Rest) -> bytes:
        if (chunk := data_of(event)) is None:
            return event
        try:
            new = rest.cut(chunk)
        except Differs as error:
            raise _Unfit("another replica's answer differs from what was sent") from error
        if new is None:
            return b""
        self.sent.note(new)
        return with_data(event, new)
