"""Carries out one sending on a socket of its own, and returns what came back."""

import io
import socket
import ssl
import time
from enum import StrEnum
from http.client import HTTPException, HTTPResponse
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from adakv_serve.loadtest.fuzzing.sending import Sending


class End(StrEnum):
    """How an exchange ended."""

    ANSWERED = "answered"
    LEFT = "left"
    CLOSED = "closed"
    CUT = "cut"
    HUNG = "hung"


class Answer(NamedTuple):
    """One answer. Names of headers are in lower case; the last of equal names counts."""

    status: int
    headers: dict[str, str]
    body: bytes


class Exchange(NamedTuple):
    """All answers that came, and how the connection ended.

    CLOSED: by the server, before an answer that is owed. CUT: inside an answer. HUNG: the limit was
    over. LEFT: by the client, as planned.
    """

    answers: tuple[Answer, ...]
    end: End
    elapsed_s: float


class _OutOfTime(Exception):
    pass


class _Incoming(io.RawIOBase):
    """The bytes that a socket receives until a deadline."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._connection = connection
        self._deadline = deadline
        self.received = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left_s = self._deadline - time.monotonic()
        if left_s <= 0:
            raise _OutOfTime
        self._connection.settimeout(left_s)
        try:
            size = self._connection.recv_into(buffer)
        except TimeoutError:
            raise _OutOfTime from None
        except ConnectionError:
            size = 0
        self.received += size
        return size


class _Shared(io.BufferedReader):
    """Stays open when a response that has been read closes it, for the response after it."""

    def makefile(self, _: str) -> "_Shared":
        return self

    def close(self) -> None:
        pass


def exchange(url: str, sending: Sending, limit_s: float) -> Exchange:
    """Send, and read until all answers are there, the client leaves, or the limit is over."""
    began = time.monotonic()
    patience_s = limit_s if sending.leaves_after_s is None else sending.leaves_after_s
    with _connected(url, limit_s) as connection:
        _write(connection, sending)
        incoming = _Incoming(connection, time.monotonic() + patience_s)
        # One that owes nothing may still answer, and may close the connection.
        answers, end = _read(incoming, sending.owed or (sending.method,))
    if end == End.HUNG and sending.leaves_after_s is not None:
        end = End.LEFT
    return Exchange(tuple(answers), end, time.monotonic() - began)


def _connected(url: str, limit_s: float) -> socket.socket:
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connection = socket.create_connection((parts.hostname, port), limit_s)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if parts.scheme == "https":
        return ssl.create_default_context().wrap_socket(connection, server_hostname=parts.hostname)
    return connection


def _write(connection: socket.socket, sending: Sending) -> None:
    # A server may answer and close before it has everything.
    try:
        for number, piece in enumerate(sending.pieces):
            if number:
                time.sleep(sending.pause_s)
            connection.sendall(piece)
        if sending.shuts:
            connection.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def _read(incoming: _Incoming, methods: tuple[str, ...]) -> tuple[list[Answer], End]:
    answers: list[Answer] = []
    shared: Any = _Shared(incoming)
    for method in methods:
        before = incoming.received
        response = HTTPResponse(shared, method=method)
        try:
            response.begin()
            body = response.read()
        except _OutOfTime:
            return answers, End.HUNG
        except (HTTPException, ValueError, OSError):
            begun = incoming.received > before or bool(shared.peek(1))
            return answers, End.CUT if begun else End.CLOSED
        headers = {name.lower(): value for name, value in response.headers.items()}
        answers.append(Answer(response.status, headers, body))
        if response.will_close:
            break
    return answers, End.ANSWERED
