"""Presets and the parameters that replace theirs."""

import dataclasses
import gc
import weakref

import pytest
import torch
from torch import Tensor

from adakv_serve.kernels.policies.head_allocations.uniform import UniformHeads
from adakv_serve.kernels.policies.layer_budgets.uniform import UniformLayers
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.policy import Policy
from adakv_serve.kernels.policies.presets import PolicyChoice, preset
from adakv_serve.kernels.policies.scorers.key_norm import KeyNormScorer
from tests.kernels.observations import observations

# Presets whose heads keep equally many entries.
EVEN_HEADS = {
    "snapkv", "pyramidkv", "streaming_llm", "expected_attention", "key_norm", "key_diff", "r_kv",
    "random",
}  # fmt: skip
FALLING_LAYERS = {"pyramidkv", "ada_pyramidkv"}
SCORED_LAYERS = {"kv_compress", "critical_kv_compress"}
# Parameters of the scorers as in the papers, or in their authors' code.
SCORER_DEFAULTS = {
    "snapkv": {
        "window_tokens": 32, "kernel_size": 7, "pooling": "max", "group_reduction": "mean",
    },
    "kv_compress": {"window_tokens": 32, "kernel_size": 7, "pooling": "max"},
    "streaming_llm": {"sink_tokens": 4, "window_tokens": 0, "query_span_tokens": 0},
    "expected_attention": {
        "query_span_tokens": 512, "future_tokens": 512, "sink_tokens": 4, "use_covariance": True,
        "use_value_norm": True, "epsilon": 0.0, "window_tokens": 0,
    },
    "defensive": {"window_tokens": 32, "kernel_size": 5, "secured_mass": 0.9},
    "key_norm": {"window_tokens": 0, "query_span_tokens": 0},
    "key_diff": {"window_tokens": 0, "query_span_tokens": 0},
    "r_kv": {
        "window_tokens": 32, "kernel_size": 7, "importance_share": 0.1, "least_similarity": 0.5,
        "spared_share": 0.1, "compared_tokens": 4096,
    },
    "random": {"seed": 0, "window_tokens": 32, "query_span_tokens": 0},
}  # fmt: skip
SAME_SCORER = {
    "pyramidkv": "snapkv", "ada_snapkv": "snapkv", "ada_pyramidkv": "snapkv",
    "critical_ada_snapkv": "snapkv", "critical_kv_compress": "kv_compress",
    "ada_expected_attention": "expected_attention", "ada_r_kv": "r_kv",
}  # fmt: skip


# Presets of papers; others need no entry here.
PUBLISHED = sorted({*SCORER_DEFAULTS, *SAME_SCORER})


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_splits_its_budget_as_its_paper_does(name: str) -> None:
    lens = preset(name).select(observations(4, 3, 2, 300, 16, seed=8), 90).lens
    even = bool((lens == lens[:, :1]).all())
    assert even is (name in EVEN_HEADS)
    layers = lens.sum(dim=1).tolist()
    if name in FALLING_LAYERS:
        assert layers == sorted(layers, reverse=True)
        assert layers[0] > 2 * layers[-1]
    else:
        assert (len(set(layers)) > 1) is (name in SCORED_LAYERS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_scorers_defaults_are_its_papers(name: str) -> None:
    scorer = preset(name).scorer
    assert dataclasses.is_dataclass(scorer)
    assert not isinstance(scorer, type)
    assert dataclasses.asdict(scorer) == SCORER_DEFAULTS[SAME_SCORER.get(name, name)]


def test_the_defaults_of_splits_are_their_papers() -> None:
    assert dataclasses.asdict(preset("ada_snapkv").head_allocation) == {"alpha": 0.2}
    assert dataclasses.asdict(preset("kv_compress").head_allocation) == {"alpha": 0.0}
    assert dataclasses.asdict(preset("pyramidkv").layer_budget) == {"beta": 20.0}


@pytest.mark.parametrize("name", ["ada_snapkv", "kv_compress"])
def test_the_second_stage_replaces_entries_but_no_counts(name: str) -> None:
    layers = observations(3, 2, 2, 200, 16, seed=4)
    first, second = (preset(one).select(layers, 80) for one in (name, f"critical_{name}"))
    assert torch.equal(first.lens, second.lens)
    assert not torch.equal(first.kept, second.kept)


def test_an_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown policy 'ada_snap': known are ada_expected"):
        preset("ada_snap")


def test_a_choices_parameters_replace_the_presets() -> None:
    policy = PolicyChoice("ada_snapkv", alpha=0.5, window_tokens=8).build()
    assert (policy.head_allocation.alpha, policy.scorer.window_tokens) == (0.5, 8)
    assert policy.scorer.query_span_tokens == 8
    with pytest.raises(ValueError, match="'snapkv' takes no alpha: its heads are uniform"):
        PolicyChoice("snapkv", alpha=0.5).build()


def test_auto_is_two_policies() -> None:
    auto = PolicyChoice("auto", alpha=0.3)
    assert auto.for_budget(255, 1024) == PolicyChoice("kv_compress", alpha=0.3)
    assert auto.for_budget(256, 1024) == PolicyChoice("defensive", alpha=0.3)
    assert auto.for_budget(1024, 1024).preset == "kv_compress"
    assert PolicyChoice("snapkv").for_budget(512, 1024) == PolicyChoice("snapkv")
    assert auto.for_budget(512, 1024, {"defensive"}).preset == "kv_compress"
    # Budgets are checked, and queries collected, before it is known which it will be.
    little, much = (auto.for_budget(keep, 1024).build().scorer for keep in (1, 512))
    assert little.window_tokens == much.window_tokens
    assert little.query_span_tokens == much.query_span_tokens
    with pytest.raises(ValueError, match="unknown policy 'automatic'"):
        PolicyChoice("automatic").build()


def test_policies_that_clients_once_chose_are_forgotten() -> None:
    chosen = weakref.ref(PolicyChoice("ada_snapkv", alpha=0.123456).build())
    assert PolicyChoice("ada_snapkv", alpha=0.123456).build() is chosen()
    for number in range(1000):
        PolicyChoice("ada_snapkv", alpha=0.5 + number / 10_000).build()
    gc.collect()
    assert chosen() is None


def test_a_policy_refuses_an_incomplete_scorer_and_a_class() -> None:
    class Incomplete:
        window_tokens = 0

    for scorer in (Incomplete(), KeyNormScorer):
        with pytest.raises(TypeError, match="is no scorer: it needs query_span_tokens"):
            Policy(scorer, UniformLayers(), UniformHeads())  # type: ignore[arg-type]


def test_scores_of_another_shape_are_refused_with_the_right_one() -> None:
    @dataclasses.dataclass(frozen=True)
    class Whole:
        window_tokens: int = 8
        query_span_tokens: int = 0

        def score(self, observation: Observation) -> Tensor:
            return torch.zeros(observation.keys.shape[:2])

    policy = Policy(Whole(), UniformLayers(), UniformHeads())
    expected = r"Whole.score returned \[2, 60\]: expected .* = \[2, 52\]"
    with pytest.raises(ValueError, match=expected):
        policy.select(observations(1, 2, 1, 60, 8, seed=0), 20)
