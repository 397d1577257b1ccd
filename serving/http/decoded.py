"""Sends the ingress the number of tokens that an engine has decoded for an HTTP request.

The ingress cannot count them in the body: one event of a stream may carry many tokens or none.
"""

from contextvars import ContextVar

from adakv_serve.serving.http.asgi import Message

# The type of the message. Clients can neither send nor see it.
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
    """Append a message with the number of tokens decoded so far to a batch of an answer."""
    return [*batch, {"type": _DECODED, "tokens": tokens}]


def without_decoded(batch: list[Message]) -> tuple[list[Message], int | None]:
    """Return the messages for the client, and the number of tokens decoded so far.

    The number is None if the batch has no message with it.
    """
    if not batch or batch[-1]["type"] != _DECODED:
        return batch, None
    return batch[:-1], batch[-1]["tokens"]
