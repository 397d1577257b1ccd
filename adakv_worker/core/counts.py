"""Counts of waiting requests and of lost work, kept as requests come and go."""

from collections.abc import Iterable
from typing import NamedTuple

from adakv_worker.messages import StepWork


class _Waiting(NamedTuple):
    blocks: int
    prefill_tokens: int


class WaitingRequests:
    """The waiting requests of one scheduler.

    blocks: blocks that starting all of them takes, slabs included.
    prefill_tokens: their tokens that are not computed yet.
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
        """Count a request; a request that waits already is counted anew."""
        self.remove(request_id)
        # A request that arrives with its cache has one token left, which is no prefill.
        waiting = _Waiting(blocks, tokens if tokens > 1 else 0)
        self._waiting[request_id] = waiting
        self.blocks += waiting.blocks
        self.prefill_tokens += waiting.prefill_tokens

    def remove(self, request_id: str) -> None:
        """Stop counting a request, if it is counted."""
        if waiting := self._waiting.pop(request_id, None):
            self.blocks -= waiting.blocks
            self.prefill_tokens -= waiting.prefill_tokens


class Recomputes:
    """Counts tokens that are computed a second time.

    That happens after preemptions, and when a request's cache is lost on its way between engines.

    tokens: their number since the engine's start.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._lost: dict[str, int] = {}

    def lose(self, request_id: str, tokens: int) -> None:
        """Note that a request's cache of `tokens` tokens is lost."""
        self._lost[request_id] = tokens

    def begin(self, request_id: str, hit_tokens: int) -> None:
        """Count what a request computes again when it starts with so many tokens from the cache."""
        self.tokens += max(0, self._lost.pop(request_id, 0) - hit_tokens)

    def forget(self, request_id: str) -> None:
        """Drop a request that has ended."""
        self._lost.pop(request_id, None)


class Work:
    """What the engine has computed since it was asked last."""

    def __init__(self) -> None:
        self._prefilled_tokens = self._decode_steps = 0

    def note(self, scheduled: Iterable[int]) -> None:
        """Count a step that has computed so many tokens of each request.

        One token of a request counts as decoding; the last token of a prompt may be among them.
        """
        counts = list(scheduled)
        self._prefilled_tokens += sum(count for count in counts if count > 1)
        self._decode_steps += 1 in counts

    def take(self) -> StepWork:
        """Return the counts and begin anew."""
        work = StepWork(self._prefilled_tokens, self._decode_steps)
        self._prefilled_tokens = self._decode_steps = 0
        return work
