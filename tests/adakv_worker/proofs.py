"""Proofs of compression, for tests that only pass them on."""

from typing import Any

from adakv_worker.messages import Proof


def make_proof(**changes: Any) -> Proof:
    """Return the proof of a prompt of 300 tokens that was compressed to 48 entries."""
    fields = {
        "policy": "ada_snapkv", "original_tokens": 300, "kept_mean": 48.0, "kept_min": 30,
        "kept_max": 70, "blocks_before": 10, "blocks_after": 3, "page_tokens": 32, **changes,
    }  # fmt: skip
    return Proof(**fields)
