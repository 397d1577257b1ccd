"""Models of several families, adapters and packed weights, each served with compression."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from adakv_serve.kernels.policies.presets import PRESETS
from adakv_worker.worker.model_parts import layer_parts
from tests.adakv_worker.engines import (
    Engine,
    Reference,
    Result,
    assert_equals_reference,
    prompt,
)
from tests.adakv_worker.tiny_models import MODELS, TinyModel, gqa, lora, opt

NEED_ROTATION = {"expected_attention", "ada_expected_attention"}
# Models without a readable rotary embedding.
WITHOUT_ROTATION = ("opt", "gpt2", "phi3_longrope")


class Served(NamedTuple):
    name: str
    model: TinyModel
    engine: Engine
    reference: Reference


@pytest.fixture(scope="module", params=MODELS)
def served(
    in_process: None, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    """Serve one model with default settings."""
    model = MODELS[request.param](tmp_path_factory.mktemp(request.param))
    engine = Engine(model.path, {}, **model.options)
    yield Served(request.param, model, engine, model.reference)
    engine.assert_nothing_leaked()
    engine.close()


def _check(result: Result, served: Served, policy: str, keep: int) -> None:
    assert result.proof is not None
    assert result.kept is not None
    assert (result.proof["policy"], result.proof["kept_mean"]) == (policy, keep)
    assert (result.proof["skipped"], result.proof["fallback"]) == (None, None)
    assert_equals_reference(result, served.reference, served.model.tolerance)


@pytest.mark.parametrize(
    ("share", "policy"), [(None, "defensive"), (0.2, "kv_compress")], ids=["much", "little"]
)
def test_long_prompts_are_compressed_by_default(
    served: Served, share: float | None, policy: str
) -> None:
    options = {} if share is None else {"adakv_keep_ratio": share}
    # The second takes more than one step.
    results = served.engine.run(
        [prompt(520), prompt(800, seed=1)],
        served.engine.params(max_tokens=20, extra_args=options),
    )
    for result in results:
        _check(result, served, policy, round((share or 0.5) * len(result.prompt)))


def test_every_preset_that_the_model_supports(served: Served) -> None:
    presets = [p for p in PRESETS if p not in NEED_ROTATION or served.name not in WITHOUT_ROTATION]
    params = [
        served.engine.params(extra_args={"adakv_policy": preset, "adakv_budget_tokens": 60})
        for preset in presets
    ]
    results = served.engine.run([prompt(300, seed=i) for i in range(len(presets))], params)
    for preset, result in zip(presets, results, strict=True):
        _check(result, served, preset, 60)


def test_scorers_see_the_weights_of_the_output_projection(served: Served) -> None:
    projections = ("attn.o_proj", "attn.out_proj", "attn.c_proj")
    (name, *_) = (n for n, _ in served.reference.model.named_modules() if n.endswith(projections))
    weight = served.reference.model.get_submodule(name).weight
    assert isinstance(weight, torch.Tensor)
    if served.name == "gpt2":
        # It stores the transposed matrix.
        weight = weight.t()
    runner = served.engine.runner
    (group,) = runner.kv_cache_config.kv_cache_groups
    part = layer_parts(runner.get_model(), group.layer_names)[0]
    assert part.output_weight is not None
    columns = torch.cat([part.output_weight(head) for head in range(part.num_kv_heads)], dim=1)
    assert torch.equal(columns.float(), weight)
    assert (part.rotary is None) == (served.name in WITHOUT_ROTATION)


@pytest.mark.parametrize("preset", sorted(NEED_ROTATION))
def test_a_request_for_an_unsupported_preset_gets_the_operators(
    served: Served, preset: str
) -> None:
    if served.name not in WITHOUT_ROTATION:
        pytest.skip("the model supports all presets")
    options = {"adakv_policy": preset, "adakv_keep_ratio": 0.3}
    (result,) = served.engine.run([prompt(600)], served.engine.params(extra_args=options))
    assert result.proof is not None
    assert (result.proof["policy"], result.proof["kept_mean"]) == ("defensive", 180)
    assert result.proof["fallback"] == (
        f"policy '{preset}' does not work with this model: expected_attention needs the model's "
        "rotary embedding"
    )
    assert_equals_reference(result, served.reference, served.model.tolerance)


@pytest.mark.parametrize("preset", sorted(NEED_ROTATION))
def test_a_configured_preset_that_the_model_does_not_support_is_refused(
    in_process: None, tmp_path: Path, preset: str
) -> None:
    model = opt(tmp_path)
    reason = f"policy '{preset}' does not work with this model .*needs the model's rotary embedding"
    with pytest.raises(ValueError, match=reason) as refused:
        Engine(model.path, {"policy": preset}, **model.options)
    _, _, working = str(refused.value).partition("these do: ")
    assert set(working.split(", ")) == {*PRESETS, "auto", "full"} - NEED_ROTATION


def test_a_rotation_that_a_model_has_is_enough(in_process: None, tmp_path: Path) -> None:
    model = gqa(tmp_path)
    engine = Engine(model.path, {"policy": "expected_attention"}, **model.options)
    (result,) = engine.run([prompt(600)])
    _check(result, Served("gqa", model, engine, model.reference), "expected_attention", 300)
    engine.close()


def test_requests_with_an_adapter_and_without_share_a_batch(
    in_process: None, tmp_path: Path
) -> None:
    from vllm.lora.request import LoRARequest

    base, adapter = lora(tmp_path)
    engine = Engine(base.path, {}, **base.options)
    lora_request = LoRARequest("adapter", 1, str(adapter.path))
    options = [{}, {"adakv_keep_ratio": 0.2}, {"adakv_policy": "critical_ada_snapkv"}]
    # The same prompts for both: a prefix of one must not serve the other.
    prompts = [prompt(600, seed=seed) for seed in range(len(options)) for _ in range(2)]
    params = [engine.params(max_tokens=20, extra_args=extra) for extra in options for _ in range(2)]
    for _ in range(2):
        results = engine.run(prompts, params, lora_request=[None, lora_request] * len(options))
        for result in results[::2]:
            assert result.kept is not None
            assert_equals_reference(result, base.reference, base.tolerance)
        for result in results[1::2]:
            assert result.kept is not None
            assert_equals_reference(result, adapter.merged.reference, base.tolerance)
    assert results[0].tokens != results[1].tokens
    engine.assert_nothing_leaked()
    engine.close()
