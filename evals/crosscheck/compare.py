"""Our selections on the prompts of the cross-check, compared with kvpress'."""

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adakv_serve.evals.answering.engine import ForcedEngine
from adakv_serve.evals.choice import Choice, Outcome
from adakv_serve.evals.samples import Sample, Tokens, tokenize
from adakv_serve.evals.theory import ObservingModel
from adakv_serve.kernels.policies.head_allocations.adaptive import AdaptiveHeads
from adakv_serve.kernels.policies.head_allocations.uniform import UniformHeads
from adakv_serve.kernels.policies.layer_budgets.uniform import UniformLayers
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.policy import Policy
from adakv_serve.kernels.policies.presets import preset
from adakv_serve.kernels.policies.projected_values import ProjectedValues
from adakv_serve.kernels.policies.scorers.expected_attention import ExpectedAttentionScorer
from adakv_serve.kernels.policies.scorers.window import WindowScorer

_WINDOW = WindowScorer(window_tokens=32, kernel_size=5, pooling="avg")
_EXPECTED = ExpectedAttentionScorer(query_span_tokens=1 << 20)
POLICIES: dict[str, Policy] = {
    "snapkv": Policy(_WINDOW, UniformLayers(), UniformHeads()),
    "ada_snapkv": Policy(_WINDOW, UniformLayers(), AdaptiveHeads(0.0)),
    "ada_snapkv_floor": Policy(_WINDOW, UniformLayers(), AdaptiveHeads(0.2)),
    "critical_ada_snapkv": Policy(_WINDOW, UniformLayers(), AdaptiveHeads(0.0), ProjectedValues()),
    "expected_attention": Policy(_EXPECTED, UniformLayers(), UniformHeads()),
    "ada_expected_attention": Policy(_EXPECTED, UniformLayers(), AdaptiveHeads(0.0)),
    "key_norm": preset("key_norm"),
    "key_diff": preset("key_diff"),
    "streaming_llm": preset("streaming_llm"),
}
# Presets that have the same parameters, for prompts of up to 516 tokens.
_IN_ENGINE = ("expected_attention", "key_norm", "key_diff", "streaming_llm")
_TIE = 1e-5


class Comparison(NamedTuple):
    """Comparison for one policy at one budget, over all prompts.

    common: share of the kept entries that both keep.
    tied: share of the other entries whose score is the last kept one's, up to rounding.
    kl, agreement: figures of kvpress' forced answers against the full cache's.
    engine_kl, engine_agreement: the engine's figures; None where its preset differs.
    """

    policy: str
    keep_tokens: int
    common: float
    tied: float | None
    kl: float
    agreement: float
    engine_kl: float | None
    engine_agreement: float | None


def compare(
    kvpress_python: Path,
    model: Path,
    engine: ForcedEngine,
    asked: Sequence[Sample],
    keeps: Sequence[int],
) -> list[Comparison]:
    """Select with both implementations and compare.

    Raises:
        OSError: kvpress' program fails; the message has the end of its error output.
    """
    tokens = [tokenize(sample, engine.tokenizer, "aware") for sample in asked]
    theirs = _ask_kvpress(kvpress_python, model, tokens, keeps)
    observing = ObservingModel(model)
    observed = [observing.observations(one.prompt, len(one.prompt)) for one in tokens]
    outcomes = [
        engine.outcomes(
            sample, one, [Choice(name, tokens=keep) for name in _IN_ENGINE for keep in keeps]
        )
        for sample, one in zip(asked, tokens, strict=True)
    ]
    return [
        _compare(
            Choice(name, tokens=keep),
            observed,
            [theirs[f"{number}/{name}/{keep}"] for number in range(len(asked))],
            outcomes,
        )
        for name in POLICIES
        for keep in keeps
    ]


def _compare(
    choice: Choice,
    observed: Sequence[Sequence[Observation]],
    answers: Sequence[dict[str, Any]],
    outcomes: Sequence[dict[Choice, Outcome]],
) -> Comparison:
    """Compare one choice over all prompts.

    Args:
        observed: layers of each prompt.
        answers: kvpress' results for each prompt.
        outcomes: the engine's for each prompt.
    """
    assert choice.tokens is not None
    policy = POLICIES[choice.policy]
    sets = [
        _compare_sets(policy, layers, choice.tokens, one["kept"])
        for layers, one in zip(observed, answers, strict=True)
    ]
    in_engine = [found[choice] for found in outcomes if choice in found]
    others = sum(other for _, other, _ in sets)
    return Comparison(
        choice.policy,
        choice.tokens,
        common=fmean(common for common, _, _ in sets),
        tied=sum(tied for _, _, tied in sets) / others if others else None,
        kl=fmean(fmean(one["kl"]) for one in answers),
        agreement=fmean(fmean(one["agreement"]) for one in answers),
        engine_kl=fmean(fmean(one.kl) for one in in_engine) if in_engine else None,
        engine_agreement=fmean(fmean(one.agreement) for one in in_engine) if in_engine else None,
    )


def _ask_kvpress(
    python: Path, model: Path, tokens: Sequence[Tokens], keeps: Sequence[int]
) -> dict[str, Any]:
    with TemporaryDirectory(prefix="adakv-crosscheck-") as folder:
        asked, out = Path(folder) / "asked.json", Path(folder) / "out.pt"
        prompts = [
            {"prompt": one.prompt, "forced": one.forced, "compressed": one.compressed}
            for one in tokens
        ]
        asked.write_text(
            json.dumps({"prompts": prompts, "presses": list(POLICIES), "keeps": list(keeps)})
        )
        script = Path(__file__).with_name("reference.py")
        command = [str(python), str(script), str(model), str(asked), str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise OSError(f"kvpress' program failed:\n{done.stderr[-2000:]}")
        return torch.load(out, weights_only=True)


def _compare_sets(
    policy: Policy, layers: Sequence[Observation], keep: int, theirs: Tensor
) -> tuple[float, int, int]:
    """Return the share of common entries, the number only we keep, and how many of these tie."""
    ours = policy.select(layers, keep).kept
    only_ours = ours & ~theirs
    common = float((ours & theirs).sum() / ours.sum())
    scores = torch.stack([policy.score(layer).scores for layer in layers])
    candidates = scores.shape[-1]
    edge = scores.masked_fill(~ours[..., :candidates], float("inf"))
    # Heads that share a budget share the cut.
    uniform = isinstance(policy.head_allocation, UniformHeads)
    last = edge.amin(dim=-1, keepdim=True) if uniform else edge.amin(dim=(1, 2), keepdim=True)
    tied = only_ours[..., :candidates] & ((scores - last).abs() <= _TIE * last.abs())
    return common, int(only_ours.sum()), int(tied.sum())
