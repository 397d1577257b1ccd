"""How many tokens an engine has decoded for an HTTP request, told to the ingress beside the body.

A body tells it only with usage, and its events may have many tokens or none.
"""

from contextvars import ContextVar

from adakv_serve.serving.http.asgi import Message

# The name of the message: no client can set or see it.
_DECODED = "adakv.decoded"


class Decoded:
    """The tokens that an engine has decoded for one HTTP request, over all of its choices."""

    def __init__(self, begun: int = 0) -> None:
        """
        Args:
            begun: tokens of its answer that another engine has decoded, and this one repeats.
        """
        self._tokens = -begun

    def note(self, tokens: int) -> None:
        self._tokens += tokens

    @property
    def tokens(self) -> int:
        return max(0, self._tokens)


# The request that this task answers.
current_decoded: ContextVar[Decoded | None] = ContextVar("adakv_decoded", default=None)


def with_decoded(batch: list[Message], tokens: int) -> list[Message]:
    """Return a batch of an answer's messages with the tokens decoded so far."""
    return [*batch, {"type": _DECODED, "tokens": tokens}]


def without_decoded(batch: list[Message]) -> tuple[list[Message], int | None]:
    """Return a batch's messages for the client, and its tokens; None if it tells no tokens."""
    if not batch or batch[-1]["type"] != _DECODED:
        return batch, None
    return batch[:-1], batch[-1]["tokens"]
