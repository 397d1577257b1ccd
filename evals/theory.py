"""Ada-KV's bound (arXiv 2407.11550, theorem 3.1) against true attention outputs.

Evicting entries changes a layer's output by at most 2 C sum_h (1 - kept attention of head h) in L1,
with C the largest L1 norm of a projected value. Adaptive heads minimize the bound for the attention
that they select by.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adakv_serve.kernels.paging.entries import read
from adakv_serve.kernels.policies.head_allocations.adaptive import AdaptiveHeads
from adakv_serve.kernels.policies.head_allocations.uniform import UniformHeads
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.presets import preset
from adakv_serve.kernels.policies.rotary import Rotary

_ROUNDING = 1e-4
SELECTIONS = ("true attention", "window")


@dataclass(frozen=True)
class Eviction:
    """L1 change of one layer's output for the last token, and its bound."""

    loss: float
    bound: float

    @property
    def keeps_to_bound(self) -> bool:
        return self.loss <= self.bound * (1 + _ROUNDING) + _ROUNDING


@dataclass(frozen=True)
class Case:
    """Evictions of one layer after one text.

    selection: attention that both select by, one of `SELECTIONS`.
    """

    layer: int
    keep_tokens: int
    selection: str
    uniform: Eviction
    adaptive: Eviction


@dataclass(frozen=True)
class Summary:
    """Counts over cases.

    violations: evictions that exceed their bound.
    lower_bounds: cases in which adaptive heads have the lower bound.
    lower_losses: cases in which adaptive heads have the lower loss.
    """

    cases: int
    violations: int
    lower_bounds: int
    lower_losses: int

    @classmethod
    def of(cls, cases: Sequence[Case]) -> "Summary":
        return cls(
            len(cases),
            sum(not e.keeps_to_bound for case in cases for e in (case.uniform, case.adaptive)),
            sum(case.adaptive.bound <= case.uniform.bound * (1 + _ROUNDING) for case in cases),
            sum(case.adaptive.loss <= case.uniform.loss for case in cases),
        )


def cases(observations: Iterable[Observation], keep_tokens: Sequence[int]) -> Iterator[Case]:
    """Yield the cases of all layers of a text, which need the queries of SnapKV's window."""
    uniform, adaptive = UniformHeads(), AdaptiveHeads(alpha=0.0)
    snapkv, ada_snapkv = preset("snapkv"), preset("ada_snapkv")
    for observation in observations:
        attention = _last_attention(observation)
        worth = attention.mean(dim=1)[None]
        projected = _projected_values(observation)
        total = observation.num_kv_heads
        for tokens in keep_tokens:
            pairs = {
                "true attention": [
                    heads.allocate(worth, [tokens * total])[0] for heads in (uniform, adaptive)
                ],
                "window": [
                    policy.select([observation], tokens).kept[0] for policy in (snapkv, ada_snapkv)
                ],
            }
            for selection, kept in pairs.items():
                one, other = (_evicted(attention, projected, mask) for mask in kept)
                yield Case(observation.layer, tokens, selection, one, other)


def _last_attention(observation: Observation) -> Tensor:
    """Return the attention [H, G, n] of the last token."""
    queries = observation.grouped_queries(1).float()
    logits = queries @ read(observation.keys).float().transpose(-1, -2)[:, None]
    return (logits * observation.scale).softmax(dim=-1)[:, :, 0]


def _projected_values(observation: Observation) -> Tensor:
    """Return the values after the output projection: [H, G, n, hidden]."""
    assert observation.output_weight is not None
    heads, group = observation.num_kv_heads, observation.group_size
    weights = torch.stack([observation.output_weight(head).float() for head in range(heads)])
    slices = weights.view(heads, weights.shape[1], group, -1)
    return torch.einsum("hnd,hogd->hgno", read(observation.values).float(), slices)


def _evicted(attention: Tensor, projected: Tensor, kept: Tensor) -> Eviction:
    """Return the eviction that leaves `kept` [H, n] of attention [H, G, n]."""
    left = attention * kept[:, None]
    change = attention - left / left.sum(dim=-1, keepdim=True)
    loss = torch.einsum("hgn,hgno->o", change, projected).abs().sum()
    largest = projected.abs().sum(dim=-1).max()
    return Eviction(float(loss), float(2 * largest * (attention - left).sum()))


class ObservingModel:
    """Hugging Face model in float32 that returns its layers' queries, keys and values."""

    def __init__(self, path: Any) -> None:
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        self._rotary = Rotary(self._model.model.rotary_emb.inv_freq)

    def observations(self, ids: Sequence[int], last: int = 32) -> list[Observation]:
        """Return the observation of each layer after a text.

        Args:
            last: number of queries, from the end of the text.
        """
        inputs: list[tuple[Any, Any, Any]] = []

        def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = kwargs.get("hidden_states", args[0] if args else None)
            inputs.append((module, hidden, kwargs["position_embeddings"]))

        layers = self._model.model.layers
        hooks = [
            layer.self_attn.register_forward_pre_hook(record, with_kwargs=True) for layer in layers
        ]
        try:
            with torch.no_grad():
                self._model.model(torch.tensor([list(ids)]), use_cache=False)
                return [
                    _observation(module, hidden[0], rotation, last, number, self._rotary)
                    for number, (module, hidden, rotation) in enumerate(inputs)
                ]
        finally:
            for hook in hooks:
                hook.remove()


def _observation(
    module: Any,
    hidden: Tensor,
    rotation: tuple[Tensor, Tensor],
    last: int,
    number: int,
    rotary: Rotary,
) -> Observation:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    def heads(projection: Any) -> Tensor:
        return projection(hidden).view(1, hidden.shape[0], -1, module.head_dim).transpose(1, 2)

    cos, sin = rotation
    queries, keys = apply_rotary_pos_emb(heads(module.q_proj), heads(module.k_proj), cos, sin)
    return Observation(
        queries[0, :, -last:],
        keys[0],
        heads(module.v_proj)[0],
        module.scaling,
        rotary,
        output_weight=lambda head: module.o_proj.weight.detach().chunk(keys.shape[1], dim=1)[head],
        layer=number,
    )
