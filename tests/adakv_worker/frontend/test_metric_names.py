"""What one proof adds to the metrics."""

from adakv_worker.frontend.metric_names import OF_COMPRESSED, amounts, request_labels
from tests.adakv_worker.proofs import make_proof


def test_a_compressed_prompt_adds_to_every_metric() -> None:
    proof = make_proof()
    assert set(amounts(proof)) == set(OF_COMPRESSED)
    assert request_labels(proof) == {"policy": proof.policy, "skipped": "no"}


def test_a_prompt_that_stays_whole_is_only_counted() -> None:
    proof = make_proof(skipped="within_budget")
    assert amounts(proof) == {}
    assert request_labels(proof)["skipped"] == "within_budget"
