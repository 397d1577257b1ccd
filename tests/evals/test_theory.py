"""Ada-KV's bound on computed outputs, with random attention and with a model's."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adakv_serve.evals.theory import ObservingModel, Summary, cases
from adakv_serve.kernels.policies.observation import Observation
from tests.adakv_worker.engines import prompt


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    heads=st.integers(1, 4),
    group=st.integers(1, 3),
    n=st.integers(40, 90),
    sharpness=st.floats(0.1, 20),
)
def test_no_eviction_changes_more_than_the_bound(
    seed: int, heads: int, group: int, n: int, sharpness: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, heads * group * 8, generator=rng)
    observation = Observation(
        torch.randn(heads * group, 32, 8, generator=rng) * sharpness,
        torch.randn(heads, n, 8, generator=rng),
        torch.randn(heads, n, 8, generator=rng),
        8**-0.5,
        output_weight=lambda head: weight.chunk(heads, dim=1)[head],
    )
    found = list(cases([observation], [34, 36]))
    assert Summary.of(found).violations == 0
    true = [case for case in found if case.selection == "true attention"]
    assert Summary.of(true).lower_bounds == len(true)


def test_a_models_layers_respect_the_bound(gqa_model: Path) -> None:
    model = ObservingModel(gqa_model)
    observations = model.observations(prompt(300, seed=5))
    found = Summary.of(list(cases(observations, [64, 128])))
    assert found.cases == len(observations) * 2 * 2
    assert found.violations == 0


def test_observations_equal_the_models_cache(gqa_model: Path) -> None:
    model, ids = ObservingModel(gqa_model), prompt(80, seed=1)
    first = model.observations(ids)[0]
    with torch.inference_mode():
        cache = model._model(torch.tensor([ids])).past_key_values
    assert torch.allclose(first.keys, cache.layers[0].keys[0], atol=1e-5)
    assert torch.allclose(first.values, cache.layers[0].values[0], atol=1e-5)
    assert first.queries.shape[1] == 32
    with pytest.raises(ValueError, match="needs 33 queries"):
        first.grouped_queries(33)
