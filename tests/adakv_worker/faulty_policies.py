"""Policies that raise an error at a chosen stage."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

from adakv_serve.kernels.policies.head_allocations.adaptive import AdaptiveHeads
from adakv_serve.kernels.policies.layer_budgets.uniform import UniformLayers
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.policy import Policy
from adakv_serve.kernels.policies.scorers.window import WindowScorer


@dataclass
class Fault:
    """Raises `error` whenever a policy reaches `stage`, after the first `spared` times.

    layer: where scoring fails.
    evicting: whether it fails in evictions instead of compressions.
    needs_scores: whether the layers' shares depend on all scores.
    ragged: whether evictions score all layers at once.
    """

    stage: str
    error: Callable[[], Exception] = lambda: RuntimeError("made for a test")
    spared: int = 0
    layer: int = 0
    evicting: bool = False
    needs_scores: bool = False
    ragged: bool = False
    times: int = field(default=0, init=False)

    def at(self, stage: str) -> None:
        if stage == self.stage:
            self.times += 1
            if self.times > self.spared:
                raise self.error()

    def policy(self) -> Policy:
        scorer = FaultyRaggedScorer if self.ragged else FaultyScorer
        return Policy(scorer(fault=self), FaultyLayers(self), FaultyHeads(fault=self))


@dataclass(frozen=True)
class FaultyScorer(WindowScorer):
    window_tokens: int = 16
    fault: Fault | None = None

    def score(self, observation: Observation) -> Tensor:
        assert self.fault is not None
        evicting = observation.seen_tokens is not None
        if (observation.layer, evicting) == (self.fault.layer, self.fault.evicting):
            self.fault.at("score")
        return super().score(observation)


@dataclass(frozen=True)
class FaultyRaggedScorer(FaultyScorer):
    def score(self, observation: Observation) -> Tensor:
        return super().score(observation)

    def score_ragged(self, observation: Observation) -> Tensor:
        return self.score(observation)


class FaultyLayers:
    def __init__(self, fault: Fault) -> None:
        self.needs_scores = fault.needs_scores
        self._fault = fault

    def totals(
        self, shape: tuple[int, int, int], quota: int, scores: Tensor | None = None
    ) -> list[int]:
        self._fault.at("totals")
        return UniformLayers().totals(shape, quota, scores)


@dataclass(frozen=True)
class FaultyHeads(AdaptiveHeads):
    fault: Fault | None = None

    def allocate(self, scores: Tensor, totals: list[int]) -> Tensor:
        assert self.fault is not None
        self.fault.at("allocate")
        return super().allocate(scores, totals)
