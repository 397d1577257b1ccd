from typing import Any

from serving.http.answer_proofs import AnswerProofs, summary


def proof(**changes: Any) -> dict[str, Any]:
    return {
        "policy": "ada_snapkv", "original_tokens": 300, "kept_mean": 48.0, "kept_min": 30,
        "kept_max": 70, "blocks_before": 10, "blocks_after": 3, "skipped": None,
        "decode_budget_tokens": None, "decode_evictions": 0, **changes,
    }  # fmt: skip


def test_a_single_proof_is_its_own_summary() -> None:
    assert summary([proof()]) == proof()
    assert summary([]) is None


def test_equal_proofs_sum_up_to_themselves() -> None:
    assert summary([proof(), proof()]) == proof()


def test_numbers_become_their_mean_and_extremes_the_extremes() -> None:
    other = proof(original_tokens=100, kept_mean=16.0, kept_min=10, kept_max=90, decode_evictions=3)
    assert summary([proof(), other]) == proof(
        original_tokens=200, kept_mean=32.0, kept_min=10, kept_max=90, decode_evictions=1.5
    )
    kinds = [type(summary([proof(), other])[key]) for key in ("original_tokens", "kept_mean")]  # type: ignore[index]
    assert kinds == [int, float]


def test_what_has_no_mean_is_mixed() -> None:
    other = proof(skipped="within_budget", policy="full", decode_budget_tokens=64)
    assert summary([proof(), other]) == proof(
        skipped="mixed", policy="mixed", decode_budget_tokens="mixed"
    )


def test_fields_that_are_not_known_here_are_summarized_too() -> None:
    proofs = [proof(fallback="policy"), proof(fallback="policy"), proof(fallback=None)]
    assert summary(proofs[:2]) == proof(fallback="policy")
    assert summary(proofs) == proof(fallback="mixed")


def test_choices_are_numbered_on_over_the_prompts() -> None:
    proofs = AnswerProofs()
    proofs.expect("first", 2)
    proofs.expect("second", 2)
    for request_id, choice in (("second", 1), ("first", 1), ("second", 0)):
        proofs.note(request_id, choice, proof(policy=f"{request_id}-{choice}"))
    found = [proofs.of_choice(index) for index in range(5)]
    assert [one and one["policy"] for one in found] == [
        None, "first-1", "second-0", "second-1", None,
    ]  # fmt: skip


def test_the_latest_proof_of_a_choice_counts() -> None:
    proofs = AnswerProofs()
    proofs.expect("only", 1)
    for evictions in range(3):
        proofs.note("only", 0, proof(decode_evictions=evictions))
    assert proofs.summary() == proofs.of_choice(0) == proof(decode_evictions=2)
