"""The signals that stop a program: the first asks it to finish, a later one ends it at once."""

import signal
import threading
import time
from collections.abc import Callable
from types import FrameType

# Signals this soon after the first belong to it: who signals a whole process group reaches `make`
# too, which passes SIGTERM on to its children.
_SAME_STOP_S = 1.0


class StopSignals:
    """Hear SIGTERM, SIGINT and SIGHUP of this process, from the main thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._first_s: float | None = None
        self._stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            # `nohup` asks for it.
            if (number, signal.getsignal(number)) != (signal.SIGHUP, signal.SIG_IGN):
                signal.signal(number, self._hear)

    def wait(self) -> None:
        """Return after the first signal.

        A signal that comes a second after the first, or later, raises KeyboardInterrupt in the
        main thread.
        """
        # Python's handlers run between two waits.
        while not self._stop.wait(1.0):
            pass

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._first_s is None:
            self._first_s = self._clock()
            self._stop.set()
        elif self._clock() - self._first_s >= _SAME_STOP_S:
            raise KeyboardInterrupt
