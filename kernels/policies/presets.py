"""Policies by name, with their authors' defaults."""

import dataclasses
import functools
from collections.abc import Callable, Container
from typing import NamedTuple

from adakv_serve.kernels.policies.head_allocations.adaptive import AdaptiveHeads
from adakv_serve.kernels.policies.head_allocations.uniform import UniformHeads
from adakv_serve.kernels.policies.layer_budgets.joint import JointLayers
from adakv_serve.kernels.policies.layer_budgets.pyramid import PyramidLayers
from adakv_serve.kernels.policies.layer_budgets.uniform import UniformLayers
from adakv_serve.kernels.policies.policy import Policy
from adakv_serve.kernels.policies.projected_values import ProjectedValues
from adakv_serve.kernels.policies.scorers.base import Scorer
from adakv_serve.kernels.policies.scorers.defensive import DefensiveScorer
from adakv_serve.kernels.policies.scorers.expected_attention import ExpectedAttentionScorer
from adakv_serve.kernels.policies.scorers.key_diff import KeyDiffScorer
from adakv_serve.kernels.policies.scorers.key_norm import KeyNormScorer
from adakv_serve.kernels.policies.scorers.random import RandomScorer
from adakv_serve.kernels.policies.scorers.redundancy import RedundancyScorer
from adakv_serve.kernels.policies.scorers.sink_recency import SinkRecencyScorer
from adakv_serve.kernels.policies.scorers.window import WindowScorer
from adakv_serve.kernels.policies.scorers.window_l2 import WindowL2Scorer

PRESETS: dict[str, Callable[[], Policy]] = {
    "snapkv": lambda: Policy(WindowScorer(), UniformLayers(), UniformHeads()),
    "pyramidkv": lambda: Policy(WindowScorer(), PyramidLayers(), UniformHeads()),
    "ada_snapkv": lambda: Policy(WindowScorer(), UniformLayers(), AdaptiveHeads()),
    "ada_pyramidkv": lambda: Policy(WindowScorer(), PyramidLayers(), AdaptiveHeads()),
    "kv_compress": lambda: Policy(WindowL2Scorer(), JointLayers(), AdaptiveHeads(alpha=0.0)),
    "streaming_llm": lambda: Policy(SinkRecencyScorer(), UniformLayers(), UniformHeads()),
    "expected_attention": lambda: Policy(
        ExpectedAttentionScorer(), UniformLayers(), UniformHeads()
    ),
    "ada_expected_attention": lambda: Policy(
        ExpectedAttentionScorer(), UniformLayers(), AdaptiveHeads()
    ),
    "critical_ada_snapkv": lambda: Policy(
        WindowScorer(), UniformLayers(), AdaptiveHeads(), ProjectedValues()
    ),
    "critical_kv_compress": lambda: Policy(
        WindowL2Scorer(), JointLayers(), AdaptiveHeads(alpha=0.0), ProjectedValues()
    ),
    "defensive": lambda: Policy(DefensiveScorer(), UniformLayers(), AdaptiveHeads()),
    "key_norm": lambda: Policy(KeyNormScorer(), UniformLayers(), UniformHeads()),
    "key_diff": lambda: Policy(KeyDiffScorer(), UniformLayers(), UniformHeads()),
    "r_kv": lambda: Policy(RedundancyScorer(), UniformLayers(), UniformHeads()),
    "ada_r_kv": lambda: Policy(RedundancyScorer(), UniformLayers(), AdaptiveHeads()),
    "random": lambda: Policy(RandomScorer(), UniformLayers(), UniformHeads()),
}

# `auto` is one of two policies, by the share of the prompt that stays (docs/quality.md).
AUTO = "auto"
DEFAULT_POLICY = AUTO
_FOR_LITTLE, _FOR_MUCH = "kv_compress", "defensive"
# Share of the prompt from which `auto` is the second.
_MUCH = 0.25


def preset(name: str) -> Policy:
    """Return the policy of a name. (`full` is no policy: it keeps everything.)

    Raises:
        ValueError: no policy has the name; the message lists the names.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown policy '{name}': known are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


class PolicyChoice(NamedTuple):
    """A preset or `auto`, with the parameters that replace the preset's; cheap to send.

    alpha, window_tokens: None for the preset's own.
    """

    preset: str
    alpha: float | None = None
    window_tokens: int | None = None

    def for_budget(
        self, keep_tokens: int, num_tokens: int, unsupported: Container[str] = ()
    ) -> "PolicyChoice":
        """Return the choice that `auto` stands for; return other choices unchanged.

        Args:
            keep_tokens: entries per head that stay of `num_tokens`.
            unsupported: presets that the model does not support.
        """
        if self.preset != AUTO:
            return self
        much = _MUCH * num_tokens <= keep_tokens < num_tokens
        # A prompt that stays whole is compressed by later evictions, which leave little.
        preset = _FOR_MUCH if much and _FOR_MUCH not in unsupported else _FOR_LITTLE
        return self._replace(preset=preset)

    def build(self) -> Policy:
        """Return the policy, cached for recent choices; for `auto` the one for small budgets.

        Raises:
            ValueError: the preset is unknown or does not take a parameter.
        """
        return configured(self)


# Bounded, because clients choose the parameters.
@functools.lru_cache(maxsize=256)
def configured(choice: PolicyChoice) -> Policy:
    """Return the preset of a choice with the choice's parameters."""
    if choice.preset == AUTO:
        # `auto` takes a parameter only if both of its policies take it.
        configured(choice._replace(preset=_FOR_MUCH))
        return configured(choice._replace(preset=_FOR_LITTLE))
    policy = preset(choice.preset)
    if choice.alpha is not None:
        if not isinstance(policy.head_allocation, AdaptiveHeads):
            raise ValueError(f"policy '{choice.preset}' takes no alpha: its heads are uniform")
        policy = dataclasses.replace(policy, head_allocation=AdaptiveHeads(choice.alpha))
    if choice.window_tokens is not None:
        scorer = _with_window(policy.scorer, choice.preset, choice.window_tokens)
        policy = dataclasses.replace(policy, scorer=scorer)
    return policy


def _with_window(scorer: Scorer, name: str, window_tokens: int) -> Scorer:
    if not dataclasses.is_dataclass(scorer) or isinstance(scorer, type):
        raise ValueError(f"policy '{name}' takes no window_tokens: its scorer is no dataclass")
    if all(field.name != "window_tokens" for field in dataclasses.fields(scorer)):
        raise ValueError(f"policy '{name}' takes no window_tokens")
    return dataclasses.replace(scorer, window_tokens=window_tokens)
