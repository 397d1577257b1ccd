"""What one router has decided: counts by reason, and its last decisions."""

from collections import Counter, deque
from collections.abc import Mapping
from typing import NamedTuple

from adakv_serve.router.chooser import Decision
from adakv_serve.router.footprint import Footprint

_MOST_DECISIONS = 20


class Decided(NamedTuple):
    """One decision.

    number: of the decision since the router's start, from 1.
    at_s: by the router's clock.
    first_token_s: predicted time to the first token on the chosen replica.
    candidates: number of replicas that were compared.
    """

    number: int
    at_s: float
    replica_id: str
    reason: str
    prompt_tokens: int
    cached_tokens: int
    peak_blocks: int
    first_token_s: float
    candidates: int


class DecisionLog:
    """Counts of a router's decisions by reason, and the last ones; it stays small."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._last: deque[Decided] = deque(maxlen=_MOST_DECISIONS)
        self._number = 0

    def count(self, reason: str) -> None:
        """Count a request by the reason of its replica, or of having no decision."""
        self._counts[reason] += 1

    def note(self, decision: Decision, footprint: Footprint, now_s: float) -> None:
        """Remember a decision."""
        best = decision.scores[0]
        self._number += 1
        self._last.append(
            Decided(
                self._number, now_s, best.replica_id, decision.reason, footprint.prompt_tokens,
                best.cached_tokens, footprint.peak_blocks, best.memory_s + best.prefill_s,
                len(decision.scores),
            )
        )  # fmt: skip

    @property
    def counts(self) -> Mapping[str, int]:
        return dict(self._counts)

    def last(self) -> list[Decided]:
        """Return the last decisions, the oldest first."""
        return list(self._last)
