"""Long answers under evictions, compared with the full cache's."""

import random

import pytest

from adakv_serve.evals.answering.engine import ForcedEngine
from adakv_serve.evals.choice import Choice
from adakv_serve.evals.generation import run_generation
from adakv_serve.evals.tasks.source import Source


@pytest.mark.slow
@pytest.mark.long
def test_long_answers_are_compared_with_the_full_caches(embedded_engine: ForcedEngine) -> None:
    choices = [Choice("ada_snapkv", tokens=64, decode_tokens=tokens) for tokens in (64, 1500)]
    source = Source(embedded_engine.tokenizer, 2048, random.Random(1))
    one, both = run_generation(embedded_engine, "model", source, choices, 2, 160)
    assert one[0].n == 1
    full, little, ample = both
    assert (full.n, full.agreement, full.kl) == (2, 1.0, 0.0)
    assert (little.kept, ample.kept) == ("64 while decoding", "1500 while decoding")
    assert little.kl is not None
    assert ample.kl is not None
    assert 0.0 < ample.kl < little.kl
