"""A cache with NaN or infinity is compressed to its budget, and disturbs no other request."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from adakv_serve.kernels.policies.presets import PRESETS
from tests.adakv_worker.engine.test_eviction import BOUND
from tests.adakv_worker.engines import Engine, prompt
from tests.adakv_worker.tiny_models import gqa

KEEP = 48
# A token that no prompt has by chance.
POISON = 1


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gqa(tmp_path_factory.mktemp("gqa")).path


def _engine(model: Path, **options: Any) -> Engine:
    settings = {"budget_tokens": KEEP, "keep_ratio": 0.0}
    return Engine(model, settings, **options)


def _overflowing(model: Path, folder: Path, weight: str, value: float) -> Path:
    """Save a model in which a weight of one layer, or an embedding, overflows or is NaN."""
    changed = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.no_grad():
        if weight == "embedding":
            changed.model.embed_tokens.weight[POISON] = value
        else:
            getattr(changed.model.layers[1].self_attn, weight).weight.mul_(value)
    changed.save_pretrained(folder)
    return folder


def _run_all_presets(engine: Engine, options: dict[str, Any]) -> None:
    params = [
        engine.params(max_tokens=80, extra_args={**options, "adakv_policy": policy})
        for policy in PRESETS
    ]
    prompts = [prompt(300, seed=number) for number in range(len(params))]
    for result in engine.run(prompts, params):
        assert result.proof is not None
        assert (result.proof["kept_mean"], result.proof["skipped"]) == (KEEP, None)
        assert len(result.tokens) == 80
        assert result.finish_reason == "length"
    engine.assert_nothing_leaked()


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="growing"),
        pytest.param(BOUND, id="bounded", marks=(pytest.mark.slow, pytest.mark.long)),
    ],
)
@pytest.mark.parametrize(
    ("weight", "value"),
    [("k_proj", 3e38), ("v_proj", 3e38), ("k_proj", float("nan")), ("v_proj", float("nan"))],
)
def test_a_cache_with_nan_or_infinity_is_compressed_to_its_budget(
    in_process: None,
    model: Path,
    tmp_path: Path,
    weight: str,
    value: float,
    options: dict[str, Any],
) -> None:
    engine = _engine(_overflowing(model, tmp_path, weight, value))
    _run_all_presets(engine, {**options, "adakv_budget_tokens": KEEP})
    engine.close()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tokens_with_nan_or_infinity_disturb_no_other_request(
    in_process: None, model: Path, tmp_path: Path, value: float
) -> None:
    engine = _engine(_overflowing(model, tmp_path, "embedding", value), max_num_seqs=40)
    never = {"logit_bias": {POISON: -100.0}}
    others = [
        (prompt(400, seed=1), engine.params(max_tokens=40, extra_args=BOUND, **never)),
        (prompt(500, seed=2), engine.params(max_tokens=40, **never)),
    ]
    alone = engine.run(*map(list, zip(*others, strict=True)))
    choices = [
        {**options, "adakv_policy": policy, "adakv_budget_tokens": KEEP}
        for policy in PRESETS
        for options in ({}, BOUND)
    ]
    poisoned = []
    for number, extra in enumerate(choices):
        ids = prompt(300, seed=10 + number)
        ids[100] = POISON
        poisoned.append((ids, engine.params(max_tokens=60, extra_args=extra)))
    # All in one batch, and the others so short that they never grow into a block that held no
    # numbers: stock kernels read what lies behind a request's entries, too.
    results = engine.run(*map(list, zip(*others, *poisoned, strict=True)))
    for bad in results[2:]:
        assert bad.proof is not None
        assert (bad.proof["kept_mean"], len(bad.tokens)) == (KEEP, 60)
    assert [result.tokens for result in results[:2]] == [result.tokens for result in alone]
    engine.assert_nothing_leaked()
    engine.close()
