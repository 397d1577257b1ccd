"""What a front door lets in while it is drained, and what still runs behind it."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple


class Running(NamedTuple):
    """A request without a whole answer so far, and its age."""

    request_id: str
    seconds: float


class Draining:
    """The requests of one front door, and until when it refuses new ones.

    It opens again by itself: a command that was killed must not close it for ever.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._until = float("-inf")
        # By a number: clients choose request ids, and may use one twice.
        self._running: dict[int, tuple[str, float]] = {}
        self._count = 0
        # Set once the requests that run now are to end, whole or not; later ones have another.
        self.cut = asyncio.Event()

    @property
    def active(self) -> bool:
        return self._clock() < self._until

    def refuse_for(self, seconds: float) -> None:
        """Refuse new requests for so long from now on."""
        self._until = self._clock() + seconds

    def cut_all(self) -> None:
        """End the requests that run now, streams with an error event."""
        self.cut.set()
        self.cut = asyncio.Event()

    def running(self) -> list[Running]:
        """Return the requests that run, the oldest first."""
        now = self._clock()
        return [Running(request_id, now - begun) for request_id, begun in self._running.values()]

    @contextlib.contextmanager
    def note(self, request_id: str) -> Iterator[None]:
        """Count a request as running inside the context."""
        self._count += 1
        number = self._count
        self._running[number] = request_id, self._clock()
        try:
            yield
        finally:
            del self._running[number]
