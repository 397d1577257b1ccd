"""The proofs of one answer and their summary."""

from typing import Any

from adakv_serve.serving.http.answer_proofs import AnswerProofs, summary
from adakv_worker.messages import HeadDetail
from adakv_worker.session_messages import SessionProof
from tests.adakv_worker.proofs import make_proof


def as_json(**changes: Any) -> dict[str, Any]:
    return {**make_proof().as_json(), **changes}


def test_a_single_proof_is_its_own_summary() -> None:
    assert summary([make_proof()]) == as_json()
    assert summary([]) is None


def test_equal_proofs_are_their_own_summary() -> None:
    assert summary([make_proof(), make_proof()]) == as_json()


def test_numbers_become_their_mean_except_least_and_greatest() -> None:
    other = make_proof(
        original_tokens=100, kept_mean=16.0, kept_min=10, kept_max=90, decode_evictions=3
    )
    assert summary([make_proof(), other]) == as_json(
        original_tokens=200, kept_mean=32.0, kept_min=10, kept_max=90, decode_evictions=1.5
    )
    kinds = [type(summary([make_proof(), other])[key]) for key in ("original_tokens", "kept_mean")]  # type: ignore[index]
    assert kinds == [int, float]


def test_values_without_a_mean_are_mixed() -> None:
    other = make_proof(skipped="within_budget", policy="full", decode_budget_tokens=64)
    assert summary([make_proof(), other]) == as_json(
        skipped="mixed", policy="mixed", decode_budget_tokens="mixed"
    )


def test_sessions_are_summarized_by_their_own_names() -> None:
    proofs = [
        make_proof(session=SessionProof(2, resumed, 100 - resumed, "pool")) for resumed in (60, 20)
    ]
    assert summary(proofs) == as_json(
        session={
            "turn": 2,
            "resumed_tokens": 40,
            "computed_tokens": 60,
            "source": "pool",
            "skipped": None,
        }
    )


def test_a_value_that_differs_in_one_proof_is_mixed() -> None:
    proofs = [
        make_proof(fallback="policy"),
        make_proof(fallback="policy"),
        make_proof(fallback=None),
    ]
    assert summary(proofs[:2]) == as_json(fallback="policy")
    assert summary(proofs) == as_json(fallback="mixed")


def test_choices_are_numbered_across_prompts() -> None:
    proofs = AnswerProofs()
    proofs.expect("first", 2)
    proofs.expect("second", 2)
    for request_id, choice in (("second", 1), ("first", 1), ("second", 0)):
        proofs.note(request_id, choice, make_proof(policy=f"{request_id}-{choice}"))
    found = [proofs.of_choice(index) for index in range(5)]
    assert [one and one["policy"] for one in found] == [
        None, "first-1", "second-0", "second-1", None,
    ]  # fmt: skip


def test_the_latest_proof_of_a_choice_counts() -> None:
    proofs = AnswerProofs()
    proofs.expect("only", 1)
    for evictions in range(3):
        proofs.note("only", 0, make_proof(decode_evictions=evictions))
    assert proofs.summary() == proofs.of_choice(0) == as_json(decode_evictions=2)


def test_the_detail_of_a_proof_is_sent_once_and_stays() -> None:
    answer = AnswerProofs()
    answer.expect("a", 1)
    detail = HeadDetail([[30, 70]], [2, 1])
    answer.note("a", 0, make_proof(detail=detail))
    answer.note("a", 0, make_proof(decode_evictions=1))
    latest = answer.of_choice(0)
    assert latest is not None
    assert latest["detail"] == {"kept": [[30, 70]], "keeping": [2, 1]}
    assert latest["decode_evictions"] == 1
    # Of two prompts they are not alike, and one may have none.
    other = make_proof(skipped="within_budget")
    assert summary([make_proof(detail=detail), other]) == as_json(detail="mixed", skipped="mixed")
