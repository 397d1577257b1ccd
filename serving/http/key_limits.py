"""How much the holder of one API key may ask for."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

_MINUTE_S = 60.0


class Limits(NamedTuple):
    """Limits of one key name; None for no limit.

    share_at_once: its largest share of the requests that the fleet computes and queues.
    """

    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    requests_at_once: int | None = None
    share_at_once: float | None = None


class LimitReached(Exception):
    """A key has used up what it may have at present.

    retry_after_s: time until it may have more; None if that depends on its other requests.
    """

    def __init__(self, message: str, retry_after_s: float | None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Bucket:
    """An amount that refills up to `per_minute`. Taking may leave a debt, which refills first."""

    def __init__(self, per_minute: float, now_s: float) -> None:
        self._per_minute = self._left = per_minute
        self._at_s = now_s

    def take(self, amount: float, now_s: float) -> None:
        """Take an amount, whether it is there or not."""
        self._left = self._at(now_s) - amount
        self._at_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return the time until `amount` is there, or all that ever can be."""
        missing = min(amount, self._per_minute) - self._at(now_s)
        return max(0.0, missing * _MINUTE_S / self._per_minute)

    def _at(self, now_s: float) -> float:
        refilled = self._left + (now_s - self._at_s) * self._per_minute / _MINUTE_S
        return min(self._per_minute, refilled)


class _Use:
    """What the requests of one key name use."""

    def __init__(self, limits: Limits, now_s: float) -> None:
        self.limits = limits
        self.at_once = 0
        self.requests = _bucket(limits.requests_per_minute, now_s)
        self.tokens = _bucket(limits.tokens_per_minute, now_s)


def _bucket(per_minute: int | None, now_s: float) -> Bucket | None:
    return None if per_minute is None else Bucket(per_minute, now_s)


class KeyLimits:
    """The limits of all keys in one of several front doors.

    Each door takes a request for as many as there are doors, so that together they keep to the
    limits while the load is even. Tokens are paid as they are computed: a key that has none left
    may end what it has begun.
    """

    def __init__(
        self,
        usual: Limits,
        by_name: Mapping[str, Limits],
        doors: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.monotonic,
        places: int = 1,
    ) -> None:
        """
        Args:
            usual: the limits of keys whose name `by_name` does not have.
            doors: returns the number of front doors.
            places: number of requests that the fleet computes and queues.
        """
        self._usual, self._by_name, self._places = usual, dict(by_name), places
        self._doors, self._clock = doors, clock
        self._used: dict[str, _Use] = {}

    def admit(self, name: str) -> "Admission":
        """Count a request of a key, until its admission ends.

        Raises:
            LimitReached: the key may not send it now.
        """
        now_s, doors = self._clock(), max(1, self._doors())
        use = self._used.get(name)
        if use is None:
            use = self._used[name] = _Use(self._by_name.get(name, self._usual), now_s)
        most = self._most_at_once(use.limits)
        if most is not None and use.at_once >= max(1, most // doors):
            raise LimitReached(f"this API key may have {most} requests in progress", None)
        for bucket, kind in ((use.requests, "requests"), (use.tokens, "tokens")):
            if bucket is not None and (wait_s := bucket.wait_s(doors, now_s)) > 0:
                raise LimitReached(f"this API key has used up its {kind} per minute", wait_s)
        if use.requests is not None:
            use.requests.take(doors, now_s)
        use.at_once += 1
        return Admission(use, doors, self._clock, functools.partial(self._ended, name))

    def _ended(self, name: str) -> None:
        use = self._used[name]
        use.at_once -= 1
        # Without configured keys, clients choose the names: each would stay for ever.
        if not use.at_once and use.requests is None and use.tokens is None:
            del self._used[name]

    def _most_at_once(self, limits: Limits) -> int | None:
        most = [] if limits.requests_at_once is None else [limits.requests_at_once]
        if limits.share_at_once is not None:
            most.append(max(1, int(limits.share_at_once * self._places)))
        return min(most, default=None)


class Admission:
    """A request that its key may send."""

    def __init__(
        self, use: _Use, doors: int, clock: Callable[[], float], on_end: Callable[[], None]
    ) -> None:
        self._use, self._doors, self._clock, self._on_end = use, doors, clock, on_end

    def pay(self, tokens: int) -> None:
        """Take tokens that the request has had computed, or give some back, if negative."""
        if self._use.tokens is not None:
            self._use.tokens.take(self._doors * tokens, self._clock())

    def end(self) -> None:
        """Note that the request is over."""
        self._on_end()
