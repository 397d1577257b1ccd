"""Trial compressions before the first request, which compile the kernels."""

import itertools
from collections.abc import Container

import torch

from adakv_serve.kernels.blocks import blocks_for_tokens, compressed_blocks_bound
from adakv_serve.kernels.policies.presets import PolicyChoice
from adakv_worker.config import FULL, CompressionConfig
from adakv_worker.core.plan import query_span
from adakv_worker.messages import Compress
from adakv_worker.worker.requests import CompressionState

_TOKENS = 1024
_REQUEST = "adakv-warm-up"


@torch.inference_mode()
def warm_up(
    state: CompressionState,
    config: CompressionConfig,
    num_blocks: int,
    unsupported: Container[str] = (),
) -> None:
    """Compress an even and an odd prompt to large and small budgets, and grow each by a token.

    Triton compiles kernels once for numbers that 16 divides, and once for others. This overwrites
    block 1 and the following ones, which no request may hold. With too few blocks it does nothing.

    Args:
        unsupported: presets that the model does not support.
    """
    if config.policy == FULL:
        return
    longest = max(_TOKENS, 2 * query_span(config.default_choice))
    for tokens, share in itertools.product((longest, longest - 1), (2, 8)):
        choice = config.default_choice.for_budget(tokens // share, tokens, unsupported)
        keep = max(tokens // share, choice.build().scorer.window_tokens + 1)
        _compress(state, choice, tokens, keep, num_blocks)


def _compress(
    state: CompressionState, choice: PolicyChoice, tokens: int, keep: int, num_blocks: int
) -> None:
    layers, _, page_tokens, _ = state.cache_shape
    prompt = blocks_for_tokens(tokens, state.block_tokens)
    slabs = compressed_blocks_bound(keep, 1, page_tokens)
    # Block 0 is vLLM's null block.
    if 1 + prompt + slabs > num_blocks:
        return
    span = query_span(choice)
    command = Compress(choice, tokens, span, keep, list(range(1 + prompt, 1 + prompt + slabs)))
    compression = state.compress(_REQUEST, command, range(1, 1 + prompt), 0, tokens - span)
    for layer in range(layers):
        compression.see(layer, state.windows.no_queries(span))
    state.finish_compressions()
    state.grow([_REQUEST])
    state.forget(_REQUEST)
