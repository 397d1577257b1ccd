"""Counts the tokens of a passing answer: as its engine does, else by its usage or its events."""

import json
import re

from adakv_serve.serving.http.asgi import Message, body_of

# The first event of a chat has the role, the last is [DONE].
_EVENTS_WITHOUT_TOKEN = 2
# JSON escapes quotes and line ends in texts: neither pattern is found in what a model wrote.
_EVENT = re.compile(rb"^data: ", re.MULTILINE)
_USAGE = re.compile(rb'"usage": ?')
_LONGEST_USAGE_BYTES = 4096
# Responses and messages call them otherwise than completions.
_NAMES = ("completion_tokens", "output_tokens")


class OutputCounter:
    """Counts the tokens of one answer."""

    def __init__(self) -> None:
        self._events = 0
        self._usage = 0
        self._decoded: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens counted so far."""
        if self._decoded is not None:
            return self._decoded
        return self._usage or max(0, self._events - _EVENTS_WITHOUT_TOKEN)

    def see(self, batch: list[Message], decoded: int | None = None) -> None:
        """Count the tokens of the next response messages.

        Args:
            decoded: tokens that the engine has decoded so far; None if it has sent no new number.
        """
        if decoded is not None:
            self._decoded = decoded
        for message in batch:
            if body := body_of(message):
                self._events += len(_EVENT.findall(body))
                self._usage = _usage(body) or self._usage


def _usage(body: bytes) -> int:
    """Return the generated tokens that the last usage in a body counts, 0 without one.

    The server writes the last one. Responses repeat the client's tools before it.
    """
    begins = [found.end() for found in _USAGE.finditer(body)]
    if not begins:
        return 0
    text = body[begins[-1] : begins[-1] + _LONGEST_USAGE_BYTES].decode("latin-1")
    try:
        usage, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return 0
    if not isinstance(usage, dict):
        return 0
    counts = (usage.get(name) for name in _NAMES)
    return max((count for count in counts if type(count) is int and count > 0), default=0)
