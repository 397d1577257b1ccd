from dataclasses import dataclass

import torch
from torch import Tensor

from adakv_serve.kernels.paging.entries import lengths, one_head, parts, per_entry
from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.rotary import Rotary


@dataclass(frozen=True)
class ExpectedAttentionScorer:
    """Expected Attention (2510.00636): attention of future queries, from their distribution.

    Queries before RoPE are modelled as Gaussian with the mean mu and covariance Sigma of the last
    queries. Averaged over the rotations of the next `future_tokens` positions, for each key k,
    log E[exp(q.k)] = mu.k * scale + k.Sigma.k * scale^2 / 2. The prompt needs no question at its
    end. kvpress' ExpectedAttentionPress takes statistics of the whole prompt; this takes the end.

    query_span_tokens: last queries, from which the statistics come.
    future_tokens: positions that the rotation is averaged over.
    sink_tokens: first entries, which always stay and count in neither statistics nor softmax.
    use_covariance: whether to add the term of Sigma.
    use_value_norm: whether to multiply by the norm of the value.
    epsilon: added to the probability, so that the norm also ranks entries without attention.
    """

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
        scores = mean.new_empty((observation.num_kv_heads, n - sinks))
        for head, of_head in enumerate(scores):
            of_head[:] = self._head_scores(observation, head, mean[head], covariance[head], sinks)
        scores = torch.nn.functional.pad(scores, (sinks, 0), value=float(scores.amax()) + 1.0)
        return scores[:, : n - self.window_tokens]

    def _head_scores(
        self, observation: Observation, head: int, mean: Tensor, covariance: Tensor, sinks: int
    ) -> Tensor:
        """Return scores [n - sinks] for queries of mean [G, D] and covariance [G, D, D]."""
        group, dim = mean.shape
        logits = mean.new_empty((group, observation.num_tokens))
        keys = one_head(observation.keys, head)
        for first, part in parts(keys, bytes_per_entry=4 * group * dim):
            some = part[0].float()
            expected = mean @ some.t() * observation.scale
            if self.use_covariance:
                quadratic = ((some @ covariance) * some).sum(dim=-1)
                expected += quadratic * observation.scale**2 / 2
            logits[:, first : first + len(some)] = expected
        scores = logits[:, sinks:].softmax(dim=-1).mean(dim=0)
        if self.use_value_norm:
            norms = per_entry(one_head(observation.values, head), lengths)[0]
            scores = (scores + self.epsilon) * norms[sinks:]
        return scores

    def _future_queries(
        self, observation: Observation, rotary: Rotary, span: int
    ) -> tuple[Tensor, Tensor]:
        """Return mean [H, G, D] and covariance [H, G, D, D] of queries at future positions."""
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
        # The mean rotation R is linear: R mu, and R Sigma R^T, first rows, then columns.
        half = rotary.apply(covariance, cos, sin)
        turned = rotary.apply(half.transpose(-1, -2), cos, sin).transpose(-1, -2)
        return rotary.apply(mean, cos, sin), turned
