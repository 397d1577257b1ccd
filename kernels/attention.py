"""Softmax attention of an observation window over all keys, causal inside the window."""

from typing import Literal

import torch
from torch import Tensor

from kernels.dispatch import Operation
from kernels.observation import Observation

# Over a group's window: the mean; the most that a query head's mean is; the sum of squares.
Reduction = Literal["mean", "max", "squares"]

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(
    torch.ops.mkldnn, "_linear_pointwise"
)


def window_attention(observation: Observation, window: int) -> Tensor:
    """Attention probabilities [H, G, w, n] of the last `window` prompt queries, float32.

    Query i of the window sees positions up to n - w + i, as in the prefill itself.
    """
    return _window_attention(
        observation.grouped_queries(window), observation.keys, observation.scale
    )


@Operation
def reduced_window_attention(
    queries: Tensor, keys: Tensor, scale: float, num_tokens: int, reduction: Reduction = "mean"
) -> Tensor:
    """What is left [H, n - w] float32 of the attention that a group's window pays to older entries.

    Args:
        queries: [H, G, w, D] of the last w positions.
        keys: [H, n or more, D]: those behind the first n are anything, and not looked at.
        scale: the softmax scale.
        num_tokens: n.
    """
    window = queries.shape[2]
    attention = _window_attention(queries, keys[:, :num_tokens], scale)[..., :-window]
    if reduction == "squares":
        return attention.square().sum(dim=(1, 2))
    if reduction == "max":
        return attention.mean(dim=2).amax(dim=1)
    return attention.mean(dim=(1, 2))


@reduced_window_attention.on("cpu")
def _reduced_on_cpu(
    queries: Tensor, keys: Tensor, scale: float, num_tokens: int, reduction: Reduction = "mean"
) -> Tensor:
    if reduction == "mean":
        return _mean_by_head(queries, keys, scale, num_tokens)
    return reduced_window_attention.reference(queries, keys, scale, num_tokens, reduction)


def _mean_by_head(queries: Tensor, keys: Tensor, scale: float, num_tokens: int) -> Tensor:
    # One KV head at a time, in place: fresh memory costs more than the arithmetic.
    heads, group, window, dim = queries.shape
    n, rows = keys.shape[1], group * window
    scaled = (queries.float() * scale).reshape(heads, rows, dim)
    keys = keys.float()
    # What lies behind the prompt is in everybody's future.
    future = _future(window, n - num_tokens + window, keys)
    # A product with this takes the mean at a fraction of what `torch.mean` over rows costs.
    averaging = scaled.new_full((1, rows), 1 / rows)
    mean = scaled.new_empty((heads, 1, n))
    for head in range(heads):
        logits = _product(scaled[head], keys[head])
        recent = logits.view(group, window, n)[..., num_tokens - window :]
        recent.masked_fill_(future, float("-inf"))
        torch.softmax(logits, dim=-1, out=logits)
        torch.mm(averaging, logits, out=mean[head])
    return mean[:, 0, : num_tokens - window]


def observed_attention(observation: Observation, window: int, reduction: Reduction) -> Tensor:
    """`reduced_window_attention` [H, n - w] of an observation's last `window` queries."""
    paged = observation.paged_keys
    return reduced_window_attention(
        observation.grouped_queries(window),
        observation.keys if paged is None else paged,
        observation.scale,
        observation.num_tokens,
        reduction,
    )


def _product(queries: Tensor, keys: Tensor) -> Tensor:
    """queries [r, D] times keys [n, D] transposed: [r, n]."""
    if _HAS_ONEDNN and (keys.is_contiguous() or keys.t().is_contiguous()):
        # What `linear` does for 16 bits; with 32 it takes MKL, at half the speed on AMD's CPUs.
        return torch.ops.mkldnn._linear_pointwise(queries, keys, None, "none", [], "")
    return queries @ keys.t()


def _window_attention(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    heads, group, window, dim = queries.shape
    n = keys.shape[1]
    flat = (queries.float() * scale).reshape(heads, group * window, dim)
    logits = torch.bmm(flat, keys.float().transpose(1, 2)).view(heads, group, window, n)
    logits[..., n - window :].masked_fill_(_future(window, window, keys), float("-inf"))
    return logits.softmax(dim=-1)


def _future(window: int, recent: int, like: Tensor) -> Tensor:
    """[w, recent] bool: which of the last keys lie after which query of the window."""
    return torch.ones((window, recent), dtype=torch.bool, device=like.device).triu(1)


def pool(scores: Tensor, kernel_size: int, mode: str) -> Tensor:
    """Pools scores [H, m] over positions, same length; mode `max`, `avg` or `none`."""
    if mode == "none" or kernel_size == 1:
        return scores
    padding = kernel_size // 2
    if mode == "max":
        return torch.nn.functional.max_pool1d(scores, kernel_size, 1, padding)
    return torch.nn.functional.avg_pool1d(scores, kernel_size, 1, padding)
