"""Which requests give way when the queue in front of the replicas is full."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Waiting:
    """A request without an answer yet.

    refused: set when it is to give way. gone: set when it does not wait any more.
    """

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.refused = asyncio.Event()
        self.gone = asyncio.Event()


class Shedding:
    """The requests of one ingress that wait and may be refused: those of a priority above 0.

    As in vLLM a lower number is more important, and 0 is usual.
    """

    def __init__(self) -> None:
        # In the order of their arrival.
        self._waiting: dict[Waiting, None] = {}

    @contextmanager
    def waits(self, priority: int) -> Iterator[Waiting]:
        """Count a request as waiting for the duration of the block."""
        one = Waiting(priority)
        if priority > 0:
            self._waiting[one] = None
        try:
            yield one
        finally:
            self._waiting.pop(one, None)
            one.gone.set()

    def make_room(self, priority: int) -> Waiting | None:
        """Refuse the least important of the waiting requests; among equals the one that came last.

        Returns:
            That one, or None if none is less important than `priority`.
        """
        candidates = [one for one in self._waiting if one.priority > priority]
        if not candidates:
            return None
        least = max(reversed(candidates), key=lambda one: one.priority)
        del self._waiting[least]
        least.refused.set()
        return least
