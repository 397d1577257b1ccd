"""Parts of a loaded model's attention layers that scorers need, found by vLLM's names."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.utils.math_utils import largest_power_of_2_divisor
from vllm.v1.attention.ops.int4_per_token_head import single_rht

from adakv_serve.kernels.paging.entries import Quantization
from adakv_serve.kernels.policies.rotary import Rotary
from adakv_worker.stored_dtypes import has_scales, stored_dtype

# Radians. Rounding to eight bits is off by less, another table by more.
_MOST_OFF = 0.1
_OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo")


class LayerParts(NamedTuple):
    """One attention layer of this rank, numbered among the model's layers.

    output_weight: returns a KV head's columns [hidden, G * D] of the output projection.
    dtype: of queries. quantized_keys, quantized_values: how blocks store them.
    paged_keys, paged_values: how pages of compressed prompts do.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    rotary: Rotary | None
    output_weight: Callable[[int], Tensor] | None
    dtype: torch.dtype = torch.float32
    quantized_keys: Quantization | None = None
    quantized_values: Quantization | None = None
    paged_keys: Quantization | None = None
    paged_values: Quantization | None = None


def layer_parts(
    model: nn.Module, layer_names: list[str], page_dtype: str = "auto"
) -> list[LayerParts]:
    """Return the parts of the attention layers in the order of `layer_names`.

    Args:
        page_dtype: how pages store numbers, by vLLM's `kv_cache_dtype`.
    """
    modules = dict(model.named_modules())
    by_layer = {
        module.layer_name: (module, modules[name.rpartition(".")[0]])
        for name, module in modules.items()
        if isinstance(module, Attention)
    }
    return [_parts(index, *by_layer[name], page_dtype) for index, name in enumerate(layer_names)]


def _parts(index: int, attention: Attention, around: nn.Module, page_dtype: str) -> LayerParts:
    candidates = (getattr(around, name, None) for name in _OUTPUT_PROJECTIONS)
    # A LoRA adapter wraps the layer; scorers use the base model's weights.
    unwrapped = (getattr(module, "base_layer", module) for module in candidates)
    output = next((module for module in unwrapped if isinstance(module, LinearBase)), None)
    return LayerParts(
        index,
        attention.num_heads,
        attention.num_kv_heads,
        attention.head_size,
        float(attention.impl.scale),
        _rotary(getattr(around, "rotary_emb", None)),
        None
        if output is None
        else functools.partial(
            _head_columns,
            output,
            attention.num_heads * attention.head_size,
            attention.num_heads // attention.num_kv_heads * attention.head_size,
        ),
        attention.dtype,
        _quantization(attention, attention.kv_cache_dtype, "_k_scale_float"),
        _quantization(attention, attention.kv_cache_dtype, "_v_scale_float"),
        _quantization(attention, page_dtype, "_k_scale_float"),
        _quantization(attention, page_dtype, "_v_scale_float"),
    )


def _quantization(attention: Attention, kv_cache_dtype: str, scale: str) -> Quantization | None:
    """Return how a layer stores keys or values in a cache of this dtype.

    Args:
        scale: name of the scale that all heads of the layer's own cache share.
    """
    stored = stored_dtype(kv_cache_dtype)
    if stored is None:
        return None
    if has_scales(kv_cache_dtype):
        rotation = None
        if kv_cache_dtype == "int4_per_token_head":
            rotation = _rotation(attention.head_size, attention.get_buffer("_k_scale").device)
        return Quantization(stored, None, attention.dtype, rotation)
    device = attention.get_buffer("_k_scale").device
    own = kv_cache_dtype == attention.kv_cache_dtype
    number = float(getattr(attention, scale)) if own else 1.0
    scales = torch.full((attention.num_kv_heads,), number, device=device)
    return Quantization(stored, scales, attention.dtype)


@functools.cache
def _rotation(size: int, device: torch.device) -> Tensor:
    """Return [D, D] float32, which turns entries [n, D] back that vLLM has turned for four bits."""
    turned: Tensor = single_rht(torch.eye(size, device=device), inverse=True)
    # Ones, minus ones and zeros, of which a GPU has computed some in 16 bits.
    return turned.round() / largest_power_of_2_divisor(size)


def _head_columns(projection: LinearBase, width: int, group_width: int, head: int) -> Tensor:
    """Return [hidden, group_width] of a linear layer [hidden, width], however it is stored."""
    stored = next(projection.parameters())
    start = head * group_width
    plain = isinstance(projection.quant_method, UnquantizedLinearMethod)
    if plain and stored.dim() == 2 and stored.shape[1] == width:
        return stored.detach()[:, start : start + group_width]
    # The layer's own kernel unpacks its weights: applied to unit vectors it returns columns.
    unit = _exact_input(projection)
    units = torch.zeros((group_width, width), dtype=projection.params_dtype, device=stored.device)
    units[:, start : start + group_width].fill_diagonal_(unit)
    assert projection.quant_method is not None
    return projection.quant_method.apply(projection, units, bias=None).t() / unit


def _exact_input(projection: LinearBase) -> float:
    """Return a number that a layer with a fixed input scale neither rounds nor clips."""
    scale = getattr(projection, "input_scale", None)
    return float(scale.max()) if isinstance(scale, Tensor) and scale.numel() else 1.0


def _rotary(embedding: nn.Module | None) -> Rotary | None:
    cache = getattr(embedding, "cos_sin_cache", None)
    if cache is None or cache.dim() != 2 or cache.shape[0] < 2:
        return None
    frequencies = rotary_frequencies(cache)
    return Rotary(frequencies, interleaved=not getattr(embedding, "is_neox_style", True))


def rotary_frequencies(table: Tensor) -> Tensor:
    """Return frequencies [D / 2] float32, radians per position, of cosines and sines [P, D].

    The table shows the result of any scaling. At position 1 the angle is the frequency; at twice a
    position the angle is known up to a small error, and the frequency's error halves. Position 1
    alone is too imprecise in 16 bits: it is wrong by whole turns after a few thousand positions.
    """
    frequencies, position = table.new_zeros((), dtype=torch.float64), 1
    while position < len(table):
        cos, sin = table[position].double().chunk(2)
        expected = frequencies * position
        off = torch.atan2(sin, cos) - expected
        off = torch.atan2(off.sin(), off.cos())
        if position > 1 and float(off.abs().max()) > _MOST_OFF:
            # The table may hold several scalings in turn: another begins here.
            break
        frequencies = (expected + off) / position
        position *= 2
    return frequencies.float()
