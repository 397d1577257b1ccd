"""Counts tokens that are computed a second time."""


class Recomputes:
    """Of one engine, since its start: after preemptions, and for requests whose cache got lost on
    its way between engines."""

    def __init__(self) -> None:
        self.tokens = 0
        self._lost: dict[str, int] = {}

    def lose(self, request_id: str, tokens: int) -> None:
        """The cache of `tokens` tokens is gone, which are to be computed again."""
        self._lost[request_id] = tokens

    def begin(self, request_id: str, hit_tokens: int) -> None:
        """A request begins, or begins again, with so many tokens from the prefix cache."""
        self.tokens += max(0, self._lost.pop(request_id, 0) - hit_tokens)

    def forget(self, request_id: str) -> None:
        self._lost.pop(request_id, None)
