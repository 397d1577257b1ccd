"""Softmax attention of an observation window over all keys, causal inside the window."""

import torch
from torch import Tensor

from kernels.observation import Observation


def window_attention(observation: Observation, window: int) -> Tensor:
    """Attention probabilities [H, G, w, n] of the last `window` prompt queries, float32.

    Query i of the window sees positions up to n - w + i, as in the prefill itself.
    """
    n = observation.num_tokens
    queries = observation.grouped_queries(window).float() * observation.scale
    keys = observation.keys.float()
    heads, group, _, dim = queries.shape
    flat = queries.reshape(heads, group * window, dim)
    logits = torch.bmm(flat, keys.transpose(1, 2)).view(heads, group, window, n)
    future = torch.ones((window, window), dtype=torch.bool, device=keys.device).triu(1)
    logits[..., n - window :].masked_fill_(future, float("-inf"))
    return logits.softmax(dim=-1)


def pool(scores: Tensor, kernel_size: int, mode: str) -> Tensor:
    """Pools scores [H, m] over positions, same length; mode `max`, `avg` or `none`."""
    if mode == "none" or kernel_size == 1:
        return scores
    padding = kernel_size // 2
    if mode == "max":
        return torch.nn.functional.max_pool1d(scores, kernel_size, 1, padding)
    return torch.nn.functional.avg_pool1d(scores, kernel_size, 1, padding)
