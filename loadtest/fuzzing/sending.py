"""What a client writes to its connection, and how: pieces, pauses, and when it leaves."""

from typing import NamedTuple

Headers = list[tuple[bytes, bytes]]


class Sending(NamedTuple):
    """One connection of a client, as bytes.

    pieces: written one after the other, with `pause_s` between two.
    shuts: whether the client then closes its half of the connection.
    leaves_after_s: when it closes the connection whatever has come; None waits for all answers.
    owed: the methods of the requests that the server must answer unless the client leaves first.
    method: that of an answer that is not owed, and may come all the same.
    """

    pieces: tuple[bytes, ...]
    owed: tuple[str, ...]
    pause_s: float = 0.0
    shuts: bool = False
    leaves_after_s: float | None = None
    method: str = "POST"


class Draft(NamedTuple):
    """One HTTP request before it is written. `length`: how its body is delimited."""

    method: bytes
    target: bytes
    headers: Headers
    body: bytes
    length: tuple[tuple[bytes, bytes], ...]
    version: bytes = b"HTTP/1.1"

    @property
    def head(self) -> bytes:
        lines = [b" ".join((self.method, self.target, self.version))]
        lines += [name + b": " + value for name, value in (*self.headers, *self.length)]
        return b"\r\n".join(lines) + b"\r\n\r\n"

    @property
    def data(self) -> bytes:
        return self.head + self.body


def content_length(value: object) -> tuple[bytes, bytes]:
    return b"content-length", str(value).encode()
