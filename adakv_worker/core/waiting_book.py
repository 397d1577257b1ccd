"""What the waiting requests will take, kept as requests come and go."""

from typing import NamedTuple


class _Waiting(NamedTuple):
    blocks: int
    prefill_tokens: int


class WaitingBook:
    """The waiting requests of one scheduler.

    blocks: what starting all of them takes, slabs included.
    prefill_tokens: their tokens that are yet to be computed.
    """

    def __init__(self) -> None:
        self.blocks = self.prefill_tokens = 0
        self._waiting: dict[str, _Waiting] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def names(self) -> set[str]:
        """Ids of the requests."""
        return set(self._waiting)

    def add(self, request_id: str, blocks: int, tokens: int) -> None:
        """Count a request; one that waits already counts anew."""
        self.remove(request_id)
        # One whose cache comes along has one token left, which is no prefill.
        waiting = _Waiting(blocks, tokens if tokens > 1 else 0)
        self._waiting[request_id] = waiting
        self.blocks += waiting.blocks
        self.prefill_tokens += waiting.prefill_tokens

    def remove(self, request_id: str) -> None:
        """Stop counting a request, if it is counted."""
        if waiting := self._waiting.pop(request_id, None):
            self.blocks -= waiting.blocks
            self.prefill_tokens -= waiting.prefill_tokens
