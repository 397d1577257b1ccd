"""Which requests of a lost replica are sent once more, and when."""

import random
import time
from collections import deque
from collections.abc import Callable

from adakv_serve.serving.http.failures import BackendFailure, ReplicaDown, ReplicaLost

# Retries are at most this share of the requests of the last time, but always a few: a request that
# kills engines must not kill them all.
_SHARE = 0.2
_LEAST = 5
_WINDOW_S = 60.0
# A request that has been worked on for longer is not worth the same work again.
_LONGEST_WORK_S = 30.0
# Time for Serve to see that a replica is gone. Lost requests do not come back all at once.
_PAUSES_S = (0.25, 0.5)
_MOST_CONTINUATIONS = 3
# Serve replaces a replica without an engine by then.
_DOWN_S = 15.0

Clock = Callable[[], float]


class Recent:
    """Counts the events of the last time, to the second."""

    def __init__(self, clock: Clock, window_s: float) -> None:
        self._clock = clock
        self._window_s = window_s
        self._seconds: deque[list[int]] = deque()
        self._count = 0

    def note(self) -> None:
        """Count one event now."""
        second = int(self._clock())
        if not self._seconds or self._seconds[-1][0] != second:
            self._seconds.append([second, 0])
        self._seconds[-1][1] += 1
        self._count += 1
        self._forget()

    @property
    def count(self) -> int:
        """Events of the last time."""
        self._forget()
        return self._count

    def __len__(self) -> int:
        """Return the seconds that it remembers."""
        return len(self._seconds)

    def _forget(self) -> None:
        oldest = self._clock() - self._window_s
        while self._seconds and self._seconds[0][0] < oldest:
            self._count -= self._seconds.popleft()[1]


class Retries:
    """The retries of one ingress."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._requests = Recent(clock, _WINDOW_S)
        self._retried = Recent(clock, _WINDOW_S)

    def begin(self) -> "Attempts":
        """Count a request, and return its attempts."""
        self._requests.note()
        return Attempts(self, self._clock)

    def take(self) -> bool:
        """Take one retry from the budget; return whether there was one left."""
        if self._retried.count >= max(_LEAST, _SHARE * self._requests.count):
            return False
        self._retried.note()
        return True


class Attempts:
    """The attempts of one request of which nothing has been sent yet."""

    def __init__(self, retries: Retries, clock: Clock) -> None:
        self._retries = retries
        self._clock = clock
        self._began_at = self._sent_at = clock()
        self._retried = False

    def pause_after(self, failure: BackendFailure) -> float | None:
        """Return the seconds to wait for another attempt; None if there is to be none."""
        if not self._may_follow(failure):
            return None
        pause_s = retry_pause_s()
        self._sent_at = self._clock() + pause_s
        return pause_s

    def _may_follow(self, failure: BackendFailure) -> bool:
        now = self._clock()
        if isinstance(failure, ReplicaDown):
            return now - self._began_at < _DOWN_S
        if not isinstance(failure, ReplicaLost) or self._retried:
            return False
        self._retried = now - self._sent_at < _LONGEST_WORK_S and self._retries.take()
        return self._retried


class Continuations:
    """The replicas at which one stream goes on after its first."""

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._count = 0
        self._lost_at = 0.0
        self._tokens = -1

    def pause_after(self, failure: BackendFailure, tokens: int) -> float | None:
        """Return the seconds to wait until it goes on; None if it is to go on nowhere.

        Args:
            tokens: number of its tokens so far.
        """
        now = self._clock()
        if type(failure) is ReplicaLost:
            # One that kills engines would kill the next one at the same token.
            if tokens <= self._tokens or self._count == _MOST_CONTINUATIONS:
                return None
            self._count += 1
            self._tokens, self._lost_at = tokens, now
        elif now - self._lost_at > _DOWN_S:
            # Other replicas may have no place for it for a moment.
            return None
        return retry_pause_s()


def retry_pause_s() -> float:
    """Return a random pause before a request goes to another replica."""
    return random.uniform(*_PAUSES_S)
