"""Occupancy reports for the tests."""

from typing import Any

from adakv_serve.router.ledger.occupancy import Occupancy


def occupancy(replica_id: str = "r1", **changes: Any) -> Occupancy:
    fields = {
        "replica_id": replica_id,
        "model": "m",
        "epoch": 1,
        "sequence": 1,
        "block_size_tokens": 32,
        "blocks_total": 100,
        "blocks_free": 40,
        "running": 2,
        "waiting": 1,
    }
    return Occupancy.model_validate({**fields, **changes})


def idle(replica_id: str, **changes: Any) -> Occupancy:
    """Return the report of a replica without requests."""
    return occupancy(replica_id, **{"blocks_free": 100, "running": 0, "waiting": 0, **changes})
