"""Bodies of requests: how large, how many at once, and how long their senders may take."""

import asyncio
import re

from adakv_serve.serving.http.asgi import Receive, body_of, is_last

_LENGTH = re.compile(r"[0-9]{1,18}")


class ClientGone(Exception):
    """The client has closed the connection."""


class BodyRefused(Exception):
    """A body that is not read, or not to its end.

    is_busy: whether it may be sent again later.
    """

    def __init__(self, status: int, error_type: str, message: str, *, is_busy: bool = False):
        super().__init__(message)
        self.status = status
        self.error_type = error_type
        self.is_busy = is_busy


def refuse_length(length: str, most_bytes: int) -> None:
    """Refuse a body by the length that its sender announces.

    Args:
        length: the request's `content-length`, empty without one.

    Raises:
        BodyRefused: it is longer than `most_bytes`, or no length at all.
    """
    if length and (not _LENGTH.fullmatch(length) or int(length) > most_bytes):
        raise _too_large(most_bytes)


def _too_large(most_bytes: int) -> BodyRefused:
    problem = f"the request body is larger than {most_bytes} bytes"
    return BodyRefused(413, "RequestTooLarge", problem)


class Bodies:
    """The bodies that one front door holds.

    held_bytes: their size at present.
    """

    def __init__(self, most_bytes: int, most_held_bytes: int, timeout_s: float) -> None:
        """
        Args:
            most_bytes: size of the largest body.
            most_held_bytes: most bytes of all bodies at once.
            timeout_s: longest time until a body is there.
        """
        self.most_bytes, self.most_held_bytes = most_bytes, most_held_bytes
        self.timeout_s = timeout_s
        self.held_bytes = 0


class Body:
    """The body of one request. It counts as held until it is released."""

    def __init__(self, bodies: Bodies) -> None:
        self._bodies = bodies
        self._held_bytes = 0

    async def read(self, receive: Receive, length: str) -> bytes:
        """Return the body.

        Args:
            length: the request's `content-length`, empty without one.

        Raises:
            BodyRefused: it is too large, too slow, or there is no room for it now.
            ClientGone: its sender has left.
        """
        refuse_length(length, self._bodies.most_bytes)
        self._check(int(length or 0))
        chunks: list[bytes] = []
        try:
            async with asyncio.timeout(self._bodies.timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    chunks.append(body_of(message))
                    self._check(self._held_bytes + len(chunks[-1]))
                    self._hold(len(chunks[-1]))
                    if is_last(message):
                        return b"".join(chunks)
        except TimeoutError:
            problem = f"the request body was not there after {self._bodies.timeout_s:g} s"
            raise BodyRefused(408, "RequestTimeout", problem) from None

    def release(self) -> None:
        """Note that the body is not needed any more."""
        self._hold(-self._held_bytes)

    def _hold(self, more_bytes: int) -> None:
        self._held_bytes += more_bytes
        self._bodies.held_bytes += more_bytes

    def _check(self, size_bytes: int) -> None:
        """Raise BodyRefused unless the body may be that large."""
        bodies = self._bodies
        if size_bytes > bodies.most_bytes:
            raise _too_large(bodies.most_bytes)
        if bodies.held_bytes - self._held_bytes + size_bytes > bodies.most_held_bytes:
            problem = "too many large requests are being answered"
            raise BodyRefused(503, "ServiceUnavailable", problem, is_busy=True)
