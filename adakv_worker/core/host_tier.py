"""Held caches in the host's memory, to which they go when the pool wants their blocks."""

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator

from adakv_worker.core.held import Held, least_valuable


class HostTier:
    """Caches whose content the workers have in the host's memory, least recently used first.

    Their content is at most that of `most_blocks` blocks.
    """

    def __init__(self, most_blocks: int, value: Callable[[Held], float]) -> None:
        """
        Args:
            value: what a cache is worth: the least valuable goes first, and one of infinite value
                only if there are no others.
        """
        self._most_blocks = most_blocks
        self._value = value
        self._parked: OrderedDict[str, Held] = OrderedDict()
        self.blocks = 0

    def __contains__(self, name: str) -> bool:
        return name in self._parked

    def __iter__(self) -> Iterator[Held]:
        return iter(self._parked.values())

    def get(self, name: str) -> Held:
        return self._parked[name]

    def fits(self, held: Held) -> bool:
        """Return whether a cache fits if all others go that can."""
        staying = sum(one.parked_blocks for one in self if self._value(one) == math.inf)
        return held.size_blocks + staying <= self._most_blocks

    def put(self, held: Held) -> list[Held]:
        """Take a cache, and return those that went to make room."""
        self._parked[held.name] = held
        self.blocks += held.parked_blocks
        out = []
        while self.blocks > self._most_blocks:
            out.append(self.take(least_valuable(self, self._value, held).name))
        return out

    def take(self, name: str) -> Held:
        """Return a cache, which is not here any more."""
        held = self._parked.pop(name)
        self.blocks -= held.parked_blocks
        return held

    def refresh(self, name: str) -> None:
        """Count a cache as used now."""
        self._parked.move_to_end(name)

    def check(self) -> None:
        """Assert that the caches fit."""
        assert self.blocks == sum(held.parked_blocks for held in self)
        assert self.blocks <= self._most_blocks, "too much is on the host"
        assert all(held.parked_blocks and not held.blocks for held in self)
