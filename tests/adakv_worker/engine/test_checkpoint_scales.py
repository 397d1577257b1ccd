"""Checkpoints that bring scales for a cache of eight bits, as llm-compressor writes them."""

from pathlib import Path

import pytest
import torch

from adakv_serve.kernels.policies.presets import PRESETS
from tests.adakv_worker.eight_bits import (
    assert_near_reference,
    attention_to,
    towards_zero,
    with_scales,
)
from tests.adakv_worker.engines import Engine, Reference, Result, prompt

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 kernels for CPUs need AVX-512"
)
# Powers of two, which change what is stored of the least numbers alone.
SCALES = (0.25, 0.125)


def answers(model: Path, kv_cache_dtype: str) -> dict[str, Result]:
    """Return an answer for each preset."""
    budget = {"budget_tokens": 48, "keep_ratio": 0.0, "window_tokens": 16}
    engine = Engine(model, budget, kv_cache_dtype=kv_cache_dtype)
    results = {}
    for policy in PRESETS:
        params = engine.params(max_tokens=12, extra_args={"adakv_policy": policy})
        (results[policy],) = engine.run([prompt(333, seed=3)], params)
    engine.assert_nothing_leaked()
    engine.close()
    return results


def test_scales_of_a_checkpoint_count_in_scores_and_answers(
    in_process: None, gqa_model: Path, tmp_path: Path
) -> None:
    plain = answers(gqa_model, "fp8")
    # The checkpoint says that its cache has eight bits.
    scaled = answers(with_scales(gqa_model, tmp_path / "scaled", SCALES), "auto")
    name = attention_to(torch.float8_e4m3fn, towards_zero, SCALES)
    reference = Reference(gqa_model, name)
    for policy in PRESETS:
        assert_near_reference(scaled[policy], reference)
        kept, before = scaled[policy].kept, plain[policy].kept
        assert kept is not None
        assert before is not None
        assert (kept == before).float().mean() > 0.99, policy
