"""Ray metrics of a replica's KV memory, as its occupancy reports tell it."""

from ray.serve import metrics

from adakv_worker.frontend import metric_names
from router.ledger.occupancy import Occupancy


class OccupancyMetrics:
    def __init__(self) -> None:
        self._blocks = metrics.Gauge(
            "adakv_blocks",
            "KV blocks: free, held by compressed and by uncompressed requests, reserved for "
            "growth, lent to and borrowed from other replicas",
            ("state",),
        )
        self._waiting_blocks = metrics.Gauge(
            "adakv_waiting_blocks", "KV blocks that starting the waiting requests takes"
        )
        self._recomputed = _Total(
            "adakv_recomputed_tokens",
            "Tokens computed again after a preemption, or because a cache got lost on its way",
        )
        self._evictions = _Total(*metric_names.DECODE_EVICTIONS)
        self._failures = _Total(*metric_names.SELECTION_FAILURES)
        self._prefill_tokens = metrics.Gauge(
            "adakv_prefill_tokens_queued", "Prompt tokens that are still to be computed"
        )

    def note(self, occupancy: Occupancy) -> None:
        for state, blocks in (
            ("free", occupancy.blocks_free),
            ("compressed", occupancy.blocks_compressed),
            ("uncompressed", occupancy.blocks_uncompressed),
            ("reserved_growth", occupancy.blocks_reserved_growth),
            ("lent", occupancy.blocks_lent),
            ("borrowed", occupancy.blocks_borrowed),
        ):
            self._blocks.set(blocks, tags={"state": state})
        self._waiting_blocks.set(occupancy.waiting_blocks or 0)
        self._prefill_tokens.set(occupancy.prefill_tokens_queued)
        self._recomputed.note(occupancy.recomputed_tokens)
        self._evictions.note(occupancy.decode_evictions)
        self._failures.note(occupancy.selection_failures)


class _Total:
    """A counter of what is told as the sum so far."""

    def __init__(self, name: str, description: str) -> None:
        self._counter = metrics.Counter(name, description)
        self._sum = 0

    def note(self, total: int | None) -> None:
        if total is not None and total > self._sum:
            self._counter.inc(total - self._sum)
            self._sum = total
