"""The figures that the fleet page shows: of one replica, and of the whole fleet at one time."""

from collections.abc import Iterable
from typing import NamedTuple

from adakv_serve.router.ledger.occupancy import Occupancy

FRESH, SILENT, GONE = 0, 1, 2


class ReplicaFigures(NamedTuple):
    """Figures of one replica. Blocks are vLLM KV blocks; `held` ones are among the free.

    state: `FRESH`; `SILENT` without a fresh report; `GONE` when it is no more.
    whole: blocks of prompts and answers that are not compressed.
    kept: share of their prompts that the compressed requests keep.
    """

    id: str
    state: int
    total: int
    free: int
    compressed: int
    whole: int
    growth: int
    held: int
    lent: int
    borrowed: int
    running: int
    waiting: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    preemptions: int
    sessions: int
    kept: float
    moves: int

    @classmethod
    def of(cls, report: Occupancy, state: int) -> "ReplicaFigures":
        return cls(
            id=report.replica_id,
            state=state,
            total=report.blocks_total,
            free=report.blocks_free,
            compressed=report.blocks_compressed,
            whole=report.blocks_uncompressed,
            growth=report.blocks_reserved_growth,
            held=report.blocks_held,
            lent=report.blocks_lent,
            borrowed=report.blocks_borrowed,
            running=report.running,
            waiting=report.waiting,
            decode_tokens_per_s=round(report.decode_tokens_per_s, 1),
            prefill_tokens_per_s=round(report.prefill_tokens_per_s, 1),
            preemptions=report.preemptions,
            sessions=report.sessions_held,
            kept=round(report.achieved_compression, 3),
            moves=report.moves or 0,
        )


class FleetFigures(NamedTuple):
    """Figures of all replicas with a fresh report, at one time.

    at_s: Unix time.
    preempted, moved: since the figures before.
    """

    at_s: float
    replicas: int
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    running: int
    waiting: int
    used_blocks: int
    total_blocks: int
    preempted: int
    moved: int


def summed(rows: Iterable[ReplicaFigures], at_s: float, preempted: int, moved: int) -> FleetFigures:
    """Return the figures of the fleet from those of its replicas."""
    fresh = [row for row in rows if row.state == FRESH]
    return FleetFigures(
        at_s=round(at_s, 1),
        replicas=len(fresh),
        decode_tokens_per_s=round(sum(row.decode_tokens_per_s for row in fresh), 1),
        prefill_tokens_per_s=round(sum(row.prefill_tokens_per_s for row in fresh), 1),
        running=sum(row.running for row in fresh),
        waiting=sum(row.waiting for row in fresh),
        used_blocks=sum(row.total - row.free for row in fresh),
        total_blocks=sum(row.total for row in fresh),
        preempted=preempted,
        moved=moved,
    )
