"""The known policies by their known names, with the authors' defaults."""

from collections.abc import Callable

from kernels.head_allocations.adaptive import AdaptiveHeads
from kernels.head_allocations.uniform import UniformHeads
from kernels.layer_budgets.joint import JointLayers
from kernels.layer_budgets.pyramid import PyramidLayers
from kernels.layer_budgets.uniform import UniformLayers
from kernels.policy import Policy
from kernels.scorers.critical import CriticalScorer
from kernels.scorers.defensive import DefensiveScorer
from kernels.scorers.expected_attention import ExpectedAttentionScorer
from kernels.scorers.key_diff import KeyDiffScorer
from kernels.scorers.key_norm import KeyNormScorer
from kernels.scorers.random import RandomScorer
from kernels.scorers.sink_recency import SinkRecencyScorer
from kernels.scorers.window import WindowScorer
from kernels.scorers.window_l2 import WindowL2Scorer

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
    "critical_ada_snapkv": lambda: Policy(CriticalScorer(), UniformLayers(), AdaptiveHeads()),
    "defensive": lambda: Policy(DefensiveScorer(), UniformLayers(), AdaptiveHeads()),
    "key_norm": lambda: Policy(KeyNormScorer(), UniformLayers(), UniformHeads()),
    "key_diff": lambda: Policy(KeyDiffScorer(), UniformLayers(), UniformHeads()),
    "random": lambda: Policy(RandomScorer(), UniformLayers(), UniformHeads()),
}
DEFAULT_PRESET = "ada_snapkv"


def preset(name: str) -> Policy:
    """Returns the policy of that name. (`full` is no policy: it keeps everything.)

    Raises:
        ValueError: there is none; names the known ones.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown policy '{name}': known are {', '.join(sorted(PRESETS))}")
    return PRESETS[name]()
