"""The presets that a loaded model supports, found by trying each on synthetic entries."""

from collections.abc import Sequence

import torch
from torch import Tensor

from adakv_serve.kernels.policies.observation import Observation
from adakv_serve.kernels.policies.presets import PRESETS
from adakv_serve.kernels.policies.rotary import Rotary
from adakv_worker.worker.model_parts import LayerParts

# Tokens of a trial, more than any preset's window.
_TOKENS = 96


@torch.inference_mode()
def unsupported_presets(parts: Sequence[LayerParts]) -> dict[str, str]:
    """Return the presets that cannot score this model's layers, with the reason.

    A preset may need a readable rotary embedding or an output projection, which some models lack.
    The trial runs on the CPU in float32 with the model's own weights and rotation.
    """
    layers = _one_of_each_kind(parts)
    found = {}
    for name, build in PRESETS.items():
        for part in layers:
            try:
                build().score(_observation(part))
            except ValueError as error:
                found[name] = str(error)
            except Exception as error:
                # Not its text, which may name a device: all ranks must agree.
                found[name] = type(error).__name__
    return found


def _one_of_each_kind(parts: Sequence[LayerParts]) -> list[LayerParts]:
    """Return one layer of each kind that scorers tell apart."""
    kinds = {
        (
            part.num_heads,
            part.num_kv_heads,
            part.head_size,
            part.rotary is None,
            None if part.output_weight is None else _kind_of_weight(part),
        ): part
        for part in parts
    }
    return list(kinds.values())


def _kind_of_weight(part: LayerParts) -> str:
    projection = getattr(part.output_weight, "args", (None,))[0]
    return type(getattr(projection, "quant_method", None)).__name__


def _observation(part: LayerParts) -> Observation:
    rotary, weight = part.rotary, part.output_weight
    dim = part.head_size
    return Observation(
        _numbers(part.num_heads, _TOKENS, dim),
        _numbers(part.num_kv_heads, _TOKENS, dim),
        _numbers(part.num_kv_heads, _TOKENS, dim),
        part.scale,
        None if rotary is None else Rotary(rotary.inv_freq.cpu(), rotary.interleaved),
        None if weight is None else lambda head: weight(head).float().cpu(),
        part.layer,
    )


def _numbers(*shape: int) -> Tensor:
    # Without the global generator, which requests sample with.
    count = torch.Size(shape).numel()
    return torch.arange(count, dtype=torch.float32).sin().view(shape)
