"""The tokens of an answer as a front end decodes it, for whoever would go on with it elsewhere."""

from collections.abc import Callable, Sequence
from contextvars import ContextVar


class AnswerTokens:
    """The tokens of one HTTP answer.

    begun_with: tokens that it begins with, which another engine has decoded.
    """

    def __init__(self, begun_with: Sequence[int] = ()) -> None:
        self.begun_with = list(begun_with)
        self._taken = len(self.begun_with)
        self._read: Callable[[], Sequence[int]] | None = None
        self._followed = 0

    def follow(self, read: Callable[[], Sequence[int]]) -> None:
        """Follow a request of the answer that could go on elsewhere.

        Args:
            read: returns its tokens so far, at least those of the text that has been sent.
        """
        self._followed += 1
        self._read = read

    def take(self) -> list[int] | None:
        """Return the tokens since the last call; None if the answer could not go on elsewhere."""
        if self._read is None or self._followed != 1:
            return None
        new = list(self._read()[self._taken :])
        self._taken += len(new)
        return new


# The answer of the requests that this task sends to the engine; None if no other engine would
# continue it.
current_answer_tokens: ContextVar[AnswerTokens | None] = ContextVar(
    "adakv_answer_tokens", default=None
)
