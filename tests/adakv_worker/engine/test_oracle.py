"""Compressed answers against a Hugging Face forward pass with exactly the kept entries unmasked."""

from pathlib import Path

import pytest

from adakv_serve.kernels.policies.presets import PRESETS
from adakv_serve.serving.models.embedded import embedded_model_path
from tests.adakv_worker.engines import (
    Engine,
    Reference,
    assert_equals_reference,
    make_tiny_model,
    prompt,
)


@pytest.mark.parametrize("policy", PRESETS)
def test_every_preset_answers_as_the_reference(
    engine: Engine, reference: Reference, policy: str
) -> None:
    lengths = [200, 333, 700]
    options = {"adakv_policy": policy, "adakv_budget_tokens": 48}
    results = engine.run(
        [prompt(length, seed=length) for length in lengths],
        engine.params(max_tokens=40, extra_args=options),
    )
    for result in results:
        assert result.proof is not None
        assert result.proof["policy"] == policy
        assert result.proof["skipped"] is None
        assert result.kept is not None
        assert result.proof["kept_mean"] == 48
        lens = result.kept.sum(dim=-1)
        assert int(lens.sum()) == lens.numel() * 48
        assert (result.proof["kept_min"], result.proof["kept_max"]) == (lens.min(), lens.max())
        assert_equals_reference(result, reference, 1e-3)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2)])
def test_mha_mqa_and_gqa(in_process: None, tmp_path: Path, heads: int, kv_heads: int) -> None:
    model = make_tiny_model(tmp_path, heads, kv_heads)
    engine = Engine(model, {"budget_tokens": 40, "keep_ratio": 0.0})
    results = engine.run([prompt(150), prompt(300, seed=1)], engine.params(max_tokens=70))
    for result in results:
        assert result.kept is not None
        assert_equals_reference(result, Reference(model), 1e-3)
    engine.assert_nothing_leaked()
    engine.close()


def test_the_embedded_model(in_process: None) -> None:
    model = embedded_model_path()
    engine = Engine(
        model, {"budget_tokens": 128, "keep_ratio": 0.0}, kv_cache_memory_bytes=128 << 20
    )
    text = [t % 49000 for t in range(7, 7 + 900 * 13, 13)]
    (result,) = engine.run([text], engine.params(max_tokens=24))
    assert result.kept is not None
    assert_equals_reference(result, Reference(model), 1e-3)
    engine.assert_nothing_leaked()
    engine.close()
