"""No prompt can hurt the engine by what it adds to a replica's metrics."""

import pytest

from adakv_serve.serving.metrics import CompressionMetrics
from adakv_worker.messages import Proof
from adakv_worker.session_messages import SessionProof
from tests.adakv_worker.proofs import make_proof


@pytest.mark.parametrize(
    "proof",
    [
        make_proof(),
        # A bounded request that frees nothing.
        make_proof(blocks_before=5, blocks_after=5),
        make_proof(skipped="within_budget"),
        make_proof(session=SessionProof(1, 0, 200, skipped="no_match")),
        make_proof(session=SessionProof(2, 150, 50, "pool")),
    ],
    ids=["compressed", "frees nothing", "whole", "no session", "resumed"],
)
def test_every_prompt_is_counted(proof: Proof) -> None:
    CompressionMetrics().note(proof)
