from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kernels.observation import Observation
from kernels.scorers.window import WindowScorer


@dataclass(frozen=True)
class CriticalScorer:
    """CriticalKV (2502.03805): scores scaled by the norm of the projected value.

    Two stages: a share of each head's entries is taken by the plain score alone, so that attention
    stays faithful; the rest compete by score times the L1 norm of the value after its slice of the
    output projection, averaged over the query group.

    first_stage_ratio: share of a head's candidates that the first stage secures.
    epsilon: added to the score, so that the value's norm counts for unattended entries too.
    """

    needs_values: ClassVar[bool] = True
    base: WindowScorer = field(default_factory=WindowScorer)
    first_stage_ratio: float = 0.1
    epsilon: float = 1e-4

    @property
    def window_tokens(self) -> int:
        return self.base.window_tokens

    @property
    def query_span_tokens(self) -> int:
        return self.base.query_span_tokens

    def score(self, observation: Observation) -> Tensor:
        if observation.output_weight is None:
            raise ValueError("critical needs the layer's output projection")
        base = self.base.score(observation)
        candidates = base.shape[1]
        norms = projected_value_norms(observation)[:, :candidates]
        scores = (base + self.epsilon) * norms
        secured = int(self.first_stage_ratio * candidates)
        order = base.sort(dim=-1, descending=True, stable=True).indices[:, :secured]
        # Lifted above everything else, and still in the order of the plain score among themselves.
        lifted = base.gather(1, order) + scores.amax() + 1.0
        return scores.scatter(1, order, lifted)


def projected_value_norms(observation: Observation) -> Tensor:
    """Mean over the query group of the L1 norm of W_o,head @ v: [H, n] float32."""
    assert observation.output_weight is not None
    heads, group = observation.num_kv_heads, observation.group_size
    values = observation.values.float()
    weight = observation.output_weight().float()
    slices = weight.reshape(weight.shape[0], heads, group, values.shape[-1])
    norms = torch.zeros(values.shape[:2], dtype=torch.float32, device=values.device)
    for member in range(group):
        projected = torch.einsum("hnd,ohd->hno", values, slices[:, :, member])
        norms += projected.abs().sum(dim=-1)
    return norms / group
