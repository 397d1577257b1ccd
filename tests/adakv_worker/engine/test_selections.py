"""What the engine keeps against what each preset selects from Hugging Face's attention inputs."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from adakv_serve.evals.theory import ObservingModel
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.policy import Policy
from adakv_serve.kernels.policies.presets import PRESETS, preset
from tests.adakv_worker.engines import Engine, Result, prompt

KEEP = 96
# Chunks have 512 tokens: at 520 the observation window lies in two of them.
LENGTHS = (200, 333, 520, 700)
# Relative difference of scores that two implementations of the same model may round apart.
TOLERANCE = 1e-3
# Share of the kept entries that such scores may decide.
MOST_TIED = 0.01


@pytest.fixture(scope="module")
def model(gqa_model: Path) -> ObservingModel:
    return ObservingModel(gqa_model)


@pytest.mark.parametrize("name", PRESETS)
def test_the_engine_keeps_what_the_preset_selects_from_hugging_faces_tensors(
    engine: Engine, model: ObservingModel, name: str
) -> None:
    options = {"adakv_policy": name, "adakv_budget_tokens": KEEP}
    results = engine.run(
        [prompt(length, seed=1000 + length) for length in LENGTHS],
        engine.params(max_tokens=2, extra_args=options),
    )
    for result in results:
        assert_selected_alike(result, preset(name), model)


def assert_selected_alike(result: Result, policy: Policy, model: ObservingModel) -> None:
    """Assert that the engine's kept entries are the policy's, but for ties at the cut."""
    span = max(policy.scorer.query_span_tokens, policy.scorer.window_tokens, 1)
    layers = model.observations(result.prompt, min(span, len(result.prompt)))
    expected = policy.select(layers, KEEP).kept
    assert result.kept is not None
    only_engine, only_expected = result.kept & ~expected, expected & ~result.kept
    differing = int(only_engine.sum())
    assert differing <= MOST_TIED * int(expected.sum()), f"{differing} entries differ"
    worth = _worth(policy, layers, expected.shape[-1])
    for entries, others in ((only_engine, only_expected), (only_expected, only_engine)):
        for value in worth[entries].tolist():
            partners = worth[others].tolist()
            assert any(value == pytest.approx(other, rel=TOLERANCE) for other in partners)


def _worth(policy: Policy, layers: list[Observation], n: int) -> Tensor:
    """Return the values [L, H, n] that decide at the cut; infinite for the window."""
    scored = [policy.score(layer) for layer in layers]
    worth = torch.stack([one.scores for one in scored])
    if policy.second_stage is not None:
        weights = torch.stack([one.weights for one in scored if one.weights is not None])
        worth = (worth + policy.second_stage.epsilon) * weights
    return torch.nn.functional.pad(worth, (0, n - worth.shape[-1]), value=float("inf"))
