from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from kernels.observation import Observation
from kernels.rotary import Rotary


@dataclass(frozen=True)
class ExpectedAttentionScorer:
    """Expected Attention (2510.00636): attention of future queries, from their distribution.

    Queries before RoPE are taken as Gaussian with the mean and covariance of the captured span.
    Averaged over the rotations of the next `future_tokens` positions they give, for each key k,
    log E[exp(q.k)] = mu.k * scale + k.Sigma.k * scale^2 / 2. Query-agnostic: it needs no question
    at the end of the prompt. As kvpress' ExpectedAttentionPress, but for the span: there the whole
    prompt gives the statistics, here its end.

    query_span_tokens: captured queries that the statistics come from.
    sink_tokens: first entries, always kept and left out of the statistics and the softmax.
    use_value_norm: weigh by the norm of the value.
    epsilon: added to the probability, so that the value norm counts for unattended keys too.
    """

    needs_values: ClassVar[bool] = True
    query_span_tokens: int = 512
    future_tokens: int = 512
    sink_tokens: int = 4
    use_covariance: bool = True
    use_value_norm: bool = True
    epsilon: float = 0.0
    window_tokens: int = 0

    def score(self, observation: Observation) -> Tensor:
        if observation.rotary is None:
            raise ValueError("expected_attention needs the model's rotary embedding")
        n, sinks = observation.num_tokens, min(self.sink_tokens, observation.num_tokens - 1)
        span = min(self.query_span_tokens, observation.queries.shape[1], n - sinks)
        mean, covariance = self._future_queries(observation, observation.rotary, span)
        keys = observation.keys[:, None, sinks:].float()
        logits = torch.einsum("hgd,hknd->hgn", mean, keys) * observation.scale
        if self.use_covariance:
            quadratic = torch.einsum("hknd,hgde,hkne->hgn", keys, covariance, keys)
            logits += quadratic * observation.scale**2 / 2
        scores = logits.softmax(dim=-1).mean(dim=1)
        if self.use_value_norm:
            values = observation.values[:, sinks:].float()
            scores = (scores + self.epsilon) * values.norm(dim=-1)
        scores = torch.nn.functional.pad(scores, (sinks, 0), value=float(scores.amax()) + 1.0)
        return scores[:, : n - self.window_tokens]

    def _future_queries(
        self, observation: Observation, rotary: Rotary, span: int
    ) -> tuple[Tensor, Tensor]:
        """Mean [H, G, D] and covariance [H, G, D, D] of queries at the coming positions."""
        n = observation.next_position
        device = observation.keys.device
        past = torch.arange(n - span, n, device=device)
        queries = rotary.rotate(observation.grouped_queries(span).float(), -past)
        mean = queries.mean(dim=2)
        centred = queries - mean[:, :, None]
        covariance = centred.transpose(-1, -2) @ centred / span
        coming = torch.arange(n, n + self.future_tokens, device=device)
        angles = coming.to(rotary.inv_freq.dtype)[:, None] * rotary.inv_freq
        cos, sin = angles.cos().mean(dim=0), angles.sin().mean(dim=0)
        # The averaged rotation R is linear: R mu, and R Sigma R^T as rows, then columns.
        half = rotary.apply(covariance, cos, sin)
        turned = rotary.apply(half.transpose(-1, -2), cos, sin).transpose(-1, -2)
        return rotary.apply(mean, cos, sin), turned
