"""What a borrower has learnt of its lenders: how fast moves to them are, and who has failed."""

import time
from collections.abc import Callable, Iterable

from adakv_serve.router.lending.leases import Room
from adakv_serve.router.lending.spill_plan import Peer
from adakv_serve.serving.spill.move import MoveReport

# Weight of a new measurement of a lender's speed.
_NEWEST = 0.3
# Lenders whose speeds are remembered, those of the last moves.
_MOST_SPEEDS = 256
# A lender that has failed may fail for each request, and each of them is computed anew.
_AVOIDED_S = 60.0


class Lenders:
    """Lenders as one borrower knows them."""

    def __init__(self, bytes_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """
        Args:
            bytes_per_s: assumed speed of a move to a lender without a measured one.
        """
        self._assumed = bytes_per_s
        self._clock = clock
        self._bytes_per_s: dict[str, float] = {}
        self._avoided_until: dict[str, float] = {}

    def peers(self, rooms: Iterable[Room]) -> list[Peer]:
        """Return those that have room and have not failed within the last minute."""
        now_s = self._clock()
        self._avoided_until = {
            lender: until for lender, until in self._avoided_until.items() if until > now_s
        }
        return [
            Peer(room.lender, room.blocks, room.host_bytes, self._speed(room.lender))
            for room in rooms
            if room.lender not in self._avoided_until
        ]

    def note(self, report: MoveReport) -> None:
        """Take the speed of a move into account."""
        speeds, before = self._bytes_per_s, self._speed(report.lender)
        speeds.pop(report.lender, None)
        speeds[report.lender] = before + _NEWEST * (report.bytes_per_s - before)
        if len(speeds) > _MOST_SPEEDS:
            del speeds[next(iter(speeds))]

    def avoid(self, lender: str) -> None:
        """Leave a lender out for a while: a move to it has failed."""
        self._avoided_until[lender] = self._clock() + _AVOIDED_S

    def _speed(self, lender: str) -> float:
        return self._bytes_per_s.get(lender, self._assumed)
