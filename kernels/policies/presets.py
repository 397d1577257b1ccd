"""The known policies by their known names, with the authors' defaults."""

import dataclasses
import functools
from collections.abc import Callable, Container
from typing import Any, NamedTuple

from kernels.policies.head_allocations.adaptive import AdaptiveHeads
from kernels.policies.head_allocations.uniform import UniformHeads
from kernels.policies.layer_budgets.joint import JointLayers
from kernels.policies.layer_budgets.pyramid import PyramidLayers
from kernels.policies.layer_budgets.uniform import UniformLayers
from kernels.policies.policy import Policy
from kernels.policies.projected_values import ProjectedValues
from kernels.policies.scorers.defensive import DefensiveScorer
from kernels.policies.scorers.expected_attention import ExpectedAttentionScorer
from kernels.policies.scorers.key_diff import KeyDiffScorer
from kernels.policies.scorers.key_norm import KeyNormScorer
from kernels.policies.scorers.random import RandomScorer
from kernels.policies.scorers.redundancy import RedundancyScorer
from kernels.policies.scorers.sink_recency import SinkRecencyScorer
from kernels.policies.scorers.window import WindowScorer
from kernels.policies.scorers.window_l2 import WindowL2Scorer

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

# Not one policy but two: which is better depends on how much stays (docs/quality.md).
AUTO = "auto"
DEFAULT_POLICY = AUTO
_FOR_LITTLE, _FOR_MUCH = "kv_compress", "defensive"
# The share of a prompt from which it is much.
_MUCH = 0.25


def preset(name: str) -> Policy:
    """Returns the policy of that name. (`full` is no policy: it keeps everything.)

    Raises:
        ValueError: there is none; names the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown policy '{name}': known are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()


class PolicyChoice(NamedTuple):
    """A preset, or `auto`, and what is changed of it; hashable and cheap to send."""

    preset: str
    alpha: float | None = None
    window_tokens: int | None = None

    def for_budget(
        self, keep_tokens: int, num_tokens: int, unsupported: Container[str] = ()
    ) -> "PolicyChoice":
        """Return what `auto` stands for where so much of a prompt stays; another choice as it is.

        Args:
            unsupported: presets that the model does not support.
        """
        if self.preset != AUTO:
            return self
        much = _MUCH * num_tokens <= keep_tokens < num_tokens
        # Where all stays, evictions will leave little of what is to come.
        preset = _FOR_MUCH if much and _FOR_MUCH not in unsupported else _FOR_LITTLE
        return self._replace(preset=preset)

    def build(self) -> Policy:
        """The policy; the same object for choices of late. Of `auto` the one for small budgets.

        Raises:
            ValueError: unknown preset, or one that does not take the value given.
        """
        return configured(self)


# Clients choose the values, so there are any number of choices.
@functools.lru_cache(maxsize=256)
def configured(choice: PolicyChoice) -> Policy:
    """The preset with its floor share and observation window replaced where given."""
    if choice.preset == AUTO:
        # What either does not take is refused for both.
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


def _with_window(scorer: Any, name: str, window_tokens: int) -> Any:
    fields = {field.name for field in dataclasses.fields(scorer)}
    if "window_tokens" not in fields:
        raise ValueError(f"policy '{name}' takes no window_tokens")
    return dataclasses.replace(scorer, window_tokens=window_tokens)
