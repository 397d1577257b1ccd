"""How a replica sends the tokens of an answer to the ingress, beside the body.

The names are of the scope and of messages between the two: no client can set or see them.
"""

from collections.abc import Sequence

from adakv_serve.serving.http.asgi import Message

# In a request's scope: the tokens with which its answer begins. Without it nobody follows them.
BEGUN_WITH = "adakv.begun_with"
_TOKENS = "adakv.tokens"


def tokens_message(tokens: Sequence[int]) -> Message:
    """Return the message before a part of an answer's body, with the tokens decoded since."""
    return {"type": _TOKENS, "tokens": list(tokens)}


def parted(batch: list[Message]) -> tuple[list[Message], list[int] | None]:
    """Return a batch's messages for the client, and its tokens; None if it tells no tokens."""
    if not batch or batch[0]["type"] != _TOKENS:
        return batch, None
    return batch[1:], batch[0]["tokens"]
