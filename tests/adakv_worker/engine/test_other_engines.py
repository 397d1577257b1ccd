"""Engines of other sizes and settings, one after the other."""

from pathlib import Path

from adakv_worker.core.answer_lengths import AnswerLengths
from tests.adakv_worker.engines import Engine, Reference, assert_equals_reference, prompt


def test_preempted_requests_come_back_right(
    in_process: None, gqa_model: Path, reference: Reference
) -> None:
    # 40 blocks of 128 KiB: four of these prompts compressed and grown do not fit together.
    engine = Engine(
        gqa_model, {"budget_tokens": 150, "keep_ratio": 0.0},
        kv_cache_memory_bytes=40 * 32 * 2 * 4 * 2 * 32 * 4, max_model_len=800,
    )  # fmt: skip
    # Admission expects short answers.
    engine.manager.admission.answer_lengths = AnswerLengths(prior_tokens=2)
    results = engine.run(
        [prompt(400, seed=300 + number) for number in range(5)],
        engine.params(max_tokens=250, ignore_eos=False),
    )
    assert engine.preemptions > 0
    assert all(len(result.tokens) == 250 for result in results)
    undisturbed = [result for result in results if result.proof["original_tokens"] == 400]  # type: ignore[index]
    assert undisturbed
    for result in undisturbed:
        assert_equals_reference(result, reference, 1e-3)
    for result in results:
        if result not in undisturbed:
            # Preempted: its second compression included its answer so far.
            assert result.proof is not None
            assert result.proof["original_tokens"] > 400
    engine.assert_nothing_leaked()
    engine.close()


def test_a_prompt_that_fits_only_uncompressed(in_process: None, gqa_model: Path) -> None:
    engine = Engine(
        gqa_model, {"budget_tokens": 300, "keep_ratio": 0.0},
        kv_cache_memory_bytes=24 * 32 * 2 * 4 * 2 * 32 * 4, max_model_len=700,
    )  # fmt: skip
    (result,) = engine.run([prompt(650, seed=13)], engine.params(max_tokens=20))
    assert result.proof is not None
    assert result.proof["skipped"] == "no_room"
    engine.assert_nothing_leaked()
    engine.close()


def test_budgets_above_the_prompt_change_nothing(in_process: None, gqa_model: Path) -> None:
    prompts = [prompt(100, seed=14), prompt(700, seed=15), prompt(700, seed=15)]
    answers = []
    for compression in (None, {"budget_tokens": 4000}):
        engine = Engine(gqa_model, compression)
        answers.append(engine.run(prompts, engine.params(max_tokens=30)))
        engine.close()
    for theirs, mine in zip(*answers, strict=True):
        assert mine.tokens == theirs.tokens
        for a, b in zip(mine.logprobs, theirs.logprobs, strict=True):
            assert a.keys() == b.keys()
            assert all(abs(a[token] - b[token]) < 1e-4 for token in a)
