"""Held caches by name and by scope, and when each was used."""

import math
from collections.abc import Callable, Iterable

from adakv_worker.core.held import Held, Match
from adakv_worker.session_messages import TokenIds

# A cache whose client names its session counts as used so many seconds later.
_SESSION_LATER_S = 60.0


class HeldIndex:
    """All held caches of an engine core, wherever their content is.

    A cache is idle that no request has used for more than `idle_s` seconds.
    """

    def __init__(self, idle_s: float, clock: Callable[[], float]) -> None:
        self._idle_s = idle_s
        self._clock = clock
        self._by_scope: dict[str, dict[str, Held]] = {}
        self._used_at_s: dict[str, float] = {}
        self._lent: set[str] = set()

    def __len__(self) -> int:
        return len(self._used_at_s)

    def __contains__(self, name: str) -> bool:
        return name in self._used_at_s

    def add(self, held: Held, age_s: float = 0.0) -> None:
        """Add a cache that was used `age_s` seconds ago."""
        self._used_at_s[held.name] = self._clock() - age_s
        self._by_scope.setdefault(held.scope, {})[held.name] = held

    def replace(self, held: Held) -> None:
        """Put a cache in place of the one of its name, as one that was used when that one was."""
        self._by_scope[held.scope][held.name] = held

    def remove(self, held: Held) -> None:
        del self._used_at_s[held.name]
        of_scope = self._by_scope[held.scope]
        del of_scope[held.name]
        if not of_scope:
            del self._by_scope[held.scope]

    def refresh(self, name: str) -> None:
        """Count a cache as used now."""
        self._used_at_s[name] = self._clock()

    def lend(self, name: str) -> None:
        """Count a cache as worth most until the next step: this one copies it."""
        self._lent.add(name)

    def next_step(self) -> None:
        self._lent.clear()

    def find(self, scope: str, token_ids: TokenIds) -> Match | None:
        """Return the cache that saves most tokens of a request, or None.

        An idle one is not found: an engine without work has taken no step to drop it.
        """
        best = None
        for held in self._by_scope.get(scope, {}).values():
            if self.is_idle(held):
                continue
            tokens = held.matching(token_ids)
            if tokens and (best is None or tokens > best.tokens):
                best = Match(held, tokens)
        return best

    def is_idle(self, held: Held) -> bool:
        return self.age_s(held) > self._idle_s

    def age_s(self, held: Held) -> float:
        """Return for how long a cache has not been used."""
        return self._clock() - self._used_at_s[held.name]

    def value(self, held: Held) -> float:
        """Return how late a cache was used; one that this step copies is worth most."""
        if held.name in self._lent:
            return math.inf
        return self._used_at_s[held.name] + _SESSION_LATER_S * held.has_session

    def check(self, all_held: Iterable[Held]) -> None:
        """Assert that these caches are in the index, and no others."""
        count = 0
        for held in all_held:
            assert held is self._by_scope[held.scope][held.name]
            count += 1
        assert sum(map(len, self._by_scope.values())) == len(self) == count
