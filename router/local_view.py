"""What one router knows of all replicas: their last reports and its own bookings since. No I/O."""

import logging
from collections.abc import Hashable, Iterable
from typing import NamedTuple

from pydantic import ValidationError

from router.footprint import Footprint
from router.ledger.occupancy import Occupancy, SchemaMismatch
from router.ledger.redis_ledger import REPORT_TTL_S
from router.score import ReplicaView, Speeds

logger = logging.getLogger(__name__)

# A report may have been made before a request that was sent shortly before it came.
_BOOKING_GRACE_S = 0.25
# A request that no report has shown by then was refused, or has ended.
_BOOKING_LIFE_S = 2.0
_QUARANTINE_S = 30.0
# What an engine computes in one step at most; only at its end does it tell of any progress.
_STEP_TOKENS = 2048
# Share of a backlog that counts for as long as the replica has not told of its end.
_DOUBT = 0.75


class _Booking(NamedTuple):
    at_s: float
    peak_blocks: int
    prompt_tokens: int


class _Replica:
    __slots__ = (
        "blocks_total", "bookings", "epoch", "prefill_since_s", "prefill_tokens", "room_blocks",
        "running", "seen_at_s", "sequence", "used_blocks", "waiting",
    )  # fmt: skip

    def __init__(self, report: Occupancy, now_s: float) -> None:
        self.bookings: dict[Hashable, _Booking] = {}
        self.epoch, self.prefill_tokens = report.epoch, 0
        self.update(report, now_s)

    def update(self, report: Occupancy, now_s: float) -> None:
        self.seen_at_s = now_s
        same_life = report.epoch == self.epoch
        self.epoch, self.sequence = report.epoch, report.sequence
        self.blocks_total = report.blocks_total
        self.used_blocks = report.blocks_total - report.blocks_free
        waiting = report.waiting_blocks or 0
        self.room_blocks = report.blocks_free - report.blocks_reserved_growth - waiting
        self.running, self.waiting = report.running, report.waiting
        # Fewer tokens: a step has ended. More: they wait for the one that runs.
        same_step = 0 < self.prefill_tokens <= report.prefill_tokens_queued
        if not (same_life and same_step):
            self.prefill_since_s = now_s
        self.prefill_tokens = report.prefill_tokens_queued
        self.drop_bookings(now_s - _BOOKING_GRACE_S)

    def prefill_left(self, now_s: float, tokens_per_s: float) -> int:
        """Prompt tokens still to be computed, with what the running step has probably done."""
        if self.room_blocks < 0:
            # Something waits for memory, and perhaps nothing is being prefilled.
            return self.prefill_tokens
        done = min(_STEP_TOKENS, int((now_s - self.prefill_since_s) * tokens_per_s))
        # A guess: a replica that may be about to be idle is not as good as one that is.
        return max(int(_DOUBT * self.prefill_tokens), self.prefill_tokens - done)

    def drop_bookings(self, before_s: float) -> None:
        if self.bookings:
            self.bookings = {
                request_id: booking
                for request_id, booking in self.bookings.items()
                if booking.at_s > before_s
            }


class LocalView:
    """The live table of one router. Times are the caller's monotonic clock, in seconds.

    dropped: malformed reports so far. quarantined: how often a replica was caught lying.
    """

    def __init__(
        self,
        ttl_s: float = REPORT_TTL_S,
        prefill_tokens_per_s: float = Speeds().prefill_tokens_per_s,
    ) -> None:
        """
        Args:
            ttl_s: how long a report is good for.
            prefill_tokens_per_s: of one replica, for progress between two reports.
        """
        self._ttl_s = ttl_s
        self._prefill_tokens_per_s = prefill_tokens_per_s
        self._replicas: dict[str, _Replica] = {}
        self._quarantine: dict[str, float] = {}
        # Where each request is booked and since when, the longest ago first.
        self._booked: dict[Hashable, tuple[str, float]] = {}
        self.dropped = 0
        self.quarantined = 0

    def receive(self, payload: bytes | str, now_s: float) -> str | None:
        """Takes a report; returns the replica's id, or None if it was dropped.

        A report that contradicts itself (negative or more than all) puts its replica into
        quarantine: its reports count for nothing for a while.
        """
        try:
            report = Occupancy.parse(payload)
        except SchemaMismatch:
            self.dropped += 1
            return None
        except ValidationError as error:
            self.dropped += 1
            self._suspect(payload, error, now_s)
            return None
        self.accept(report, now_s)
        return report.replica_id

    def accept(self, report: Occupancy, now_s: float) -> None:
        """Takes a report that has been parsed. An older one than the last changes nothing."""
        if self._quarantine.get(report.replica_id, now_s) > now_s:
            return
        known = self._replicas.get(report.replica_id)
        if known is None:
            self._replicas[report.replica_id] = _Replica(report, now_s)
        elif (report.epoch, report.sequence) > (known.epoch, known.sequence):
            known.update(report, now_s)

    def withdraw(self, replica_id: str) -> None:
        self._replicas.pop(replica_id, None)

    def book(
        self, request_id: Hashable, replica_id: str, footprint: Footprint, now_s: float
    ) -> None:
        """Counts a request as there, and nowhere else, until the replica's own reports do."""
        self.unbook(request_id)
        self._forget_bookings(now_s - _BOOKING_LIFE_S)
        if known := self._replicas.get(replica_id):
            known.bookings[request_id] = _Booking(
                now_s, footprint.peak_blocks, footprint.prompt_tokens
            )
            self._booked[request_id] = replica_id, now_s

    def unbook(self, request_id: Hashable) -> None:
        """The request counts nowhere any more, but where a report shows it."""
        replica_id, _ = self._booked.pop(request_id, ("", 0.0))
        if known := self._replicas.get(replica_id):
            known.bookings.pop(request_id, None)

    def _forget_bookings(self, before_s: float) -> None:
        while self._booked and next(iter(self._booked.values()))[1] <= before_s:
            del self._booked[next(iter(self._booked))]

    def views(self, replica_ids: Iterable[str], now_s: float) -> list[ReplicaView]:
        """Those of the replicas whose reports are fresh."""
        views = []
        for replica_id in replica_ids:
            known = self._replicas.get(replica_id)
            if known is None or now_s - known.seen_at_s > self._ttl_s:
                continue
            known.drop_bookings(now_s - _BOOKING_LIFE_S)
            bookings = known.bookings.values()
            views.append(
                ReplicaView(
                    replica_id,
                    known.blocks_total,
                    known.room_blocks - sum(booking.peak_blocks for booking in bookings),
                    known.used_blocks,
                    known.running,
                    known.waiting + len(bookings),
                    known.prefill_left(now_s, self._prefill_tokens_per_s)
                    + sum(booking.prompt_tokens for booking in bookings),
                )
            )
        return views

    def blocks_total(self, replica_id: str) -> int:
        """All blocks of the replica; 0 if it has never reported."""
        known = self._replicas.get(replica_id)
        return 0 if known is None else known.blocks_total

    @property
    def replica_ids(self) -> list[str]:
        """Replicas that have reported, lately or not."""
        return list(self._replicas)

    def _suspect(self, payload: bytes | str, error: ValidationError, now_s: float) -> None:
        replica_id = Occupancy.claimed_replica_id(payload)
        # A field that is missing or of the wrong type is a fault, not a lie.
        lies = {"greater_than_equal", "greater_than", "value_error"}
        if replica_id is None or not any(detail["type"] in lies for detail in error.errors()):
            return
        if self._quarantine.get(replica_id, now_s) <= now_s:
            self.quarantined += 1
            text = error.errors()[0]["msg"]
            logger.warning(
                "replica %s reports nonsense (%s), ignored for a while", replica_id, text
            )
        self._quarantine[replica_id] = now_s + _QUARANTINE_S
        self.withdraw(replica_id)
