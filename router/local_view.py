"""The state of all replicas as one router sees it: their last reports, and its own bookings."""

import logging
from collections.abc import Hashable, Iterable
from typing import NamedTuple

from pydantic import ValidationError

from adakv_serve.router.footprint import Footprint
from adakv_serve.router.ledger.occupancy import REPORT_TTL_S, Occupancy, Report, SchemaMismatch
from adakv_serve.router.score import ReplicaView, Speeds
from adakv_serve.router.slowness import Slowness, relative, usual_ratio

logger = logging.getLogger(__name__)

# A report may be older than a request that was sent shortly before the report arrived.
_BOOKING_GRACE_S = 0.25
# By then a report shows the request, or the replica has refused or ended it.
_BOOKING_LIFE_S = 2.0
_QUARANTINE_S = 30.0
# A replica that has been silent for so long is forgotten. Live ones report every second.
_SILENCE_S = 60.0
# The most tokens an engine computes in one step; it reports progress only at the step's end.
_STEP_TOKENS = 2048
# Share of a backlog that counts until the replica reports the backlog's end.
_DOUBT = 0.75
# How often the speeds of all replicas are compared.
_COMPARE_S = 1.0


class _Booking(NamedTuple):
    at_s: float
    peak_blocks: int
    prefill_tokens: int


class _Replica:
    __slots__ = (
        "blocks_total", "bookings", "epoch", "prefill_since_s", "prefill_tokens", "report",
        "room_blocks", "running", "seen_at_s", "sequence", "slowness", "used_blocks", "waiting",
    )  # fmt: skip

    def __init__(self, report: Occupancy, now_s: float, speeds: Speeds) -> None:
        self.slowness = Slowness(speeds)
        # By request, in the order of booking.
        self.bookings: dict[Hashable, _Booking] = {}
        self.epoch, self.prefill_tokens = report.epoch, 0
        self.update(report, now_s)

    def update(self, report: Occupancy, now_s: float) -> None:
        self.seen_at_s, self.report = now_s, report
        self.slowness.note(report, now_s)
        same_life = report.epoch == self.epoch
        self.epoch, self.sequence = report.epoch, report.sequence
        self.blocks_total = report.blocks_total
        self.used_blocks = report.blocks_total - report.blocks_free
        waiting = report.waiting_blocks or 0
        self.room_blocks = report.blocks_free - report.blocks_reserved_growth - waiting
        self.running, self.waiting = report.running, report.waiting
        # A step's end lowers the number of tokens; arrivals raise it while the same step runs.
        same_step = 0 < self.prefill_tokens <= report.prefill_tokens_queued
        if not (same_life and same_step):
            self.prefill_since_s = now_s
        self.prefill_tokens = report.prefill_tokens_queued
        self.drop_bookings(now_s - _BOOKING_GRACE_S)

    def prefill_left(self, now_s: float, tokens_per_s: float) -> int:
        """Estimate the prompt tokens still to be computed, while a step runs."""
        if self.room_blocks < 0:
            # Requests wait for memory, so perhaps no prefill runs.
            return self.prefill_tokens
        done = min(_STEP_TOKENS, int((now_s - self.prefill_since_s) * tokens_per_s))
        # A replica that is only estimated to be idle ranks below one that reports it.
        return max(int(_DOUBT * self.prefill_tokens), self.prefill_tokens - done)

    def drop_bookings(self, before_s: float) -> None:
        while self.bookings:
            request_id, booking = next(iter(self.bookings.items()))
            if booking.at_s > before_s:
                break
            del self.bookings[request_id]

    def bookings_after(self, at_s: float) -> dict[Hashable, _Booking]:
        return {key: booking for key, booking in self.bookings.items() if booking.at_s > at_s}


class LocalView:
    """Live table of one router. Times are seconds of the caller's monotonic clock.

    dropped: malformed reports so far.
    quarantined: how often a replica was put into quarantine.
    """

    def __init__(
        self,
        ttl_s: float = REPORT_TTL_S,
        speeds: Speeds | None = None,
    ) -> None:
        """
        Args:
            ttl_s: how long a report counts.
            speeds: of one replica, for its progress between two reports.
        """
        self._ttl_s = ttl_s
        self._silence_s = max(_SILENCE_S, ttl_s)
        self._speeds = speeds or Speeds()
        self._usual_ratio: float | None = None
        self._compared_at_s = float("-inf")
        # By replica: the one that has been silent for longest comes first.
        self._replicas: dict[str, _Replica] = {}
        # End of the quarantine by replica.
        self._quarantine: dict[str, float] = {}
        # Replica and time of each booking, the oldest first.
        self._booked: dict[Hashable, tuple[str, float]] = {}
        self.dropped = 0
        self.quarantined = 0

    def receive(self, payload: bytes | str, now_s: float) -> None:
        """Take a report, or drop and count it if it is malformed or of another major version.

        A report that contradicts itself (a negative count, more free blocks than blocks) puts its
        replica into quarantine, during which its reports are ignored.
        """
        try:
            report = Occupancy.parse(payload)
        except SchemaMismatch:
            self.dropped += 1
        except ValidationError as error:
            self.dropped += 1
            self._suspect(payload, error, now_s)
        else:
            self.accept(report, now_s)

    def accept(self, report: Occupancy, now_s: float) -> None:
        """Take a parsed report, unless it is older than the replica's last one."""
        replica_id = report.replica_id
        if self._quarantine.get(replica_id, now_s) > now_s:
            return
        known = self._replicas.get(replica_id)
        if known is None:
            known = _Replica(report, now_s, self._speeds)
        elif (report.epoch, report.sequence) > (known.epoch, known.sequence):
            known.update(report, now_s)
            del self._replicas[replica_id]
        else:
            return
        self._replicas[replica_id] = known
        while (silent := next(iter(self._replicas.items())))[1].seen_at_s < now_s - self._silence_s:
            del self._replicas[silent[0]]

        if now_s - self._compared_at_s >= _COMPARE_S:
            self._compared_at_s = now_s
            ratios = (known.slowness.ratio for known in self._replicas.values())
            self._usual_ratio = usual_ratio(ratios)

    def withdraw(self, replica_id: str) -> None:
        self._replicas.pop(replica_id, None)

    def book(
        self,
        request_id: Hashable,
        replica_id: str,
        footprint: Footprint,
        now_s: float,
        cached_tokens: int = 0,
    ) -> None:
        """Count a request on this replica alone, until the replica's own reports show it.

        Args:
            cached_tokens: tokens of its prompt that the replica need not compute.
        """
        self.unbook(request_id)
        before_s = now_s - _BOOKING_LIFE_S
        while self._booked and next(iter(self._booked.values()))[1] <= before_s:
            del self._booked[next(iter(self._booked))]
        if known := self._replicas.get(replica_id):
            known.drop_bookings(before_s)
            prefill_tokens = max(0, footprint.prompt_tokens - cached_tokens)
            known.bookings[request_id] = _Booking(now_s, footprint.peak_blocks, prefill_tokens)
            self._booked[request_id] = replica_id, now_s

    def answered(self, request_id: Hashable) -> None:
        """Stop counting the prefill of a request that has its first output."""
        replica_id, _ = self._booked.get(request_id, ("", 0.0))
        known = self._replicas.get(replica_id)
        if known is not None and (booking := known.bookings.get(request_id)) is not None:
            known.bookings[request_id] = booking._replace(prefill_tokens=0)

    def unbook(self, request_id: Hashable) -> None:
        """Stop counting a request, except in reports that show it."""
        replica_id, _ = self._booked.pop(request_id, ("", 0.0))
        if known := self._replicas.get(replica_id):
            known.bookings.pop(request_id, None)

    def _fresh(self, replica_id: str, now_s: float) -> _Replica | None:
        known = self._replicas.get(replica_id)
        return None if known is None or now_s - known.seen_at_s > self._ttl_s else known

    def silent(self, replica_ids: Iterable[str], now_s: float) -> int:
        """Return how many of those replicas have no fresh report."""
        return sum(self._fresh(replica_id, now_s) is None for replica_id in replica_ids)

    def views(self, replica_ids: Iterable[str], now_s: float) -> list[ReplicaView]:
        """Return the views of those replicas whose reports are fresh."""
        views = []
        for replica_id in replica_ids:
            known = self._fresh(replica_id, now_s)
            if known is None:
                continue
            bookings = known.bookings_after(now_s - _BOOKING_LIFE_S).values()
            views.append(
                ReplicaView(
                    replica_id,
                    known.blocks_total,
                    known.room_blocks - sum(booking.peak_blocks for booking in bookings),
                    known.used_blocks,
                    known.running,
                    known.waiting + len(bookings),
                    known.prefill_left(now_s, self._speeds.prefill_tokens_per_s)
                    + sum(booking.prefill_tokens for booking in bookings),
                    relative(known.slowness.ratio, self._usual_ratio),
                )
            )
        return views

    def blocks_total(self, replica_id: str) -> int:
        """Return all blocks of the replica, 0 without a report of it."""
        known = self._replicas.get(replica_id)
        return 0 if known is None else known.blocks_total

    def last_reports(self, now_s: float) -> list[Report]:
        """Return the last report of each replica, fresh or stale."""
        known = self._replicas.values()
        return [Report(one.report, max(0.0, now_s - one.seen_at_s)) for one in known]

    @property
    def replica_ids(self) -> list[str]:
        """Replicas with a report, fresh or stale."""
        return list(self._replicas)

    def _suspect(self, payload: bytes | str, error: ValidationError, now_s: float) -> None:
        replica_id = Occupancy.claimed_replica_id(payload)
        # A missing field or one of the wrong type is another version's, not a contradiction.
        contradictions = {"greater_than_equal", "greater_than", "value_error"}
        kinds = {detail["type"] for detail in error.errors()}
        if replica_id is None or not kinds & contradictions:
            return
        for over in [each for each, end_s in self._quarantine.items() if end_s <= now_s]:
            del self._quarantine[over]
        if replica_id not in self._quarantine:
            self.quarantined += 1
            text = error.errors()[0]["msg"]
            logger.warning(
                "replica %s reports nonsense (%s), ignored for %d s",
                replica_id, text, _QUARANTINE_S,
            )  # fmt: skip
        self._quarantine[replica_id] = now_s + _QUARANTINE_S
        self.withdraw(replica_id)


def check_local_view(view: LocalView) -> None:
    """Assert that each request is booked once, and that old entries are gone."""
    last_s = max((at_s for _, at_s in view._booked.values()), default=0.0)
    for replica_id, known in view._replicas.items():
        for request_id in known.bookings_after(last_s - _BOOKING_LIFE_S):
            booked_at = view._booked.get(request_id, (replica_id, 0.0))[0]
            assert booked_at == replica_id, f"{request_id} is booked twice"
        _check_booked([booking.at_s for booking in known.bookings.values()])
    _check_booked([at_s for _, at_s in view._booked.values()])
    seen = [known.seen_at_s for known in view._replicas.values()]
    assert not seen or min(seen) >= max(seen) - view._silence_s, "a silent replica is remembered"


def _check_booked(at_s: list[float]) -> None:
    assert at_s == sorted(at_s), "bookings are out of order"
    assert not at_s or at_s[0] > at_s[-1] - _BOOKING_LIFE_S, "an ended booking is remembered"
