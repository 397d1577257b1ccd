"""Forced answers in a real engine against a Hugging Face forward pass."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from adakv_serve.evals.answering.engine import ForcedEngine
from adakv_serve.evals.choice import FULL, Choice
from adakv_serve.evals.samples import Sample, Tokens
from tests.adakv_worker.engines import prompt

SAMPLE = Sample("task", "1", "1", "", (), "")
TOKENS = Tokens(prompt(300, seed=5), prompt(12, seed=6), 2)


@pytest.fixture(scope="module")
def engine(in_process: None, gqa_model: Path) -> Iterator[ForcedEngine]:
    engine = ForcedEngine(gqa_model, 1024, 32 << 20, skip_tokenizer_init=True)
    yield engine
    engine.close()


def test_the_full_cache_predicts_what_a_forward_pass_predicts(
    engine: ForcedEngine, gqa_model: Path
) -> None:
    (outcome,) = engine.outcomes(SAMPLE, TOKENS, []).values()
    ids = torch.tensor([TOKENS.prompt + TOKENS.forced])
    model = LlamaForCausalLM.from_pretrained(gqa_model, dtype=torch.float32).eval()
    with torch.inference_mode():
        logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
    begin = len(TOKENS.prompt) + TOKENS.answer
    expected = [-float(logprobs[i - 1, ids[0, i]]) for i in range(begin, ids.shape[1])]
    assert outcome.surprise == pytest.approx(expected, abs=1e-3)
    assert all(outcome.agreement)
    assert outcome.kl == [0.0] * 10


def test_choices_are_measured_against_the_full_cache(engine: ForcedEngine) -> None:
    ample, half, little = (Choice("ada_snapkv", tokens=tokens) for tokens in (400, 150, 40))
    outcomes = engine.outcomes(SAMPLE, TOKENS, [ample, half, little])
    assert outcomes[ample].skipped == "within_budget"
    assert max(outcomes[ample].kl) < 1e-5
    assert (outcomes[half].kept_tokens, outcomes[little].kept_tokens) == (150, 40)
    assert 0 < sum(outcomes[half].kl) < sum(outcomes[little].kl)
    assert outcomes[Choice(FULL)].kept_tokens == 300


def test_a_repeated_question_has_the_same_outcome(engine: ForcedEngine) -> None:
    choices = [Choice(policy, tokens=64) for policy in ("snapkv", "kv_compress", "streaming_llm")]
    first, again = (engine.outcomes(SAMPLE, TOKENS, choices) for _ in range(2))
    for choice in choices:
        assert first[choice].predicted == again[choice].predicted
        assert first[choice].kl == pytest.approx(again[choice].kl, abs=1e-4)
