"""Hugging Face attention to keys and values of fewer bits, as caches store them."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.models.llama.modeling_llama import eager_attention_forward
from vllm.platforms import current_platform
from vllm.v1.attention.ops.int4_per_token_head import single_rht

from tests.adakv_worker.engines import Reference, Result

FORMATS = {"fp8": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
# Log-probabilities may differ by this on average. Where sums have another order, a number near a
# border is stored as its neighbour, which is an eighth or a quarter away.
_TOLERANCE = 0.03

Form = TypeVar("Form", torch.dtype, str)


def towards_zero(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """Return numbers within the dtype's range as vLLM's CPU kernel stores them."""
    rounded = numbers.to(dtype)
    further = rounded.float().abs() > numbers.abs()
    return (rounded.view(torch.uint8) - further.to(torch.uint8)).view(dtype).float()


def as_stored(numbers: Tensor, form: str) -> Tensor:
    """Return numbers [..., D] as vLLM's Triton kernels store them in a cache of this dtype."""
    if form == "fp8":
        return numbers.to(torch.float8_e4m3fn).float()
    if form.startswith("int4"):
        turn = single_rht(torch.eye(numbers.shape[-1], device=current_platform.device_type))
        turn = turn.round().to(numbers.device)
        turned = numbers @ turn
        least, most = turned.aminmax(dim=-1, keepdim=True)
        scales = (most - least) / 15
        zeros = (-least / scales).round().clamp(0, 15)
        steps = (turned / scales + zeros).round().clamp(0, 15)
        return (steps - zeros) * scales @ turn.t() / numbers.shape[-1]
    highest = 127 if form.startswith("int8") else 448
    scales = numbers.abs().amax(dim=-1, keepdim=True) / highest
    steps = numbers / scales
    kept = steps.round() if highest == 127 else steps.to(torch.float8_e4m3fn).float()
    return kept * scales


def assert_near_reference(
    result: Result, reference: Reference, kept_at: Sequence[Tensor | None] | None = None
) -> None:
    """Assert what `assert_equals_reference` does, on average."""
    expected = reference.logprobs(result, kept_at)
    off = [
        abs(logprob - float(expected[step, candidate]))
        for step, logprobs in enumerate(result.logprobs)
        for candidate, logprob in logprobs.items()
    ]
    assert len(off) >= 5 * len(result.tokens) > 0
    assert sum(off) / len(off) < _TOLERANCE


def with_scales(model: Path, folder: Path, scales: tuple[float, float]) -> Path:
    """Copy a model as one whose makers measured scales for a cache of `fp8`, and return `folder`.

    Args:
        scales: what stored keys and values of each layer are multiplied with.
    """
    shutil.copytree(model, folder, dirs_exist_ok=True)
    settings = json.loads((folder / "config.json").read_text())
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": scheme,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(settings))
    weights = load_file(folder / "model.safetensors")
    for layer in range(settings["num_hidden_layers"]):
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            weights[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([scale])
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def attention_to(
    form: Form,
    storing: Callable[[Tensor, Form], Tensor],
    scales: tuple[float, float] = (1.0, 1.0),
) -> str:
    """Register an attention to keys and values that are stored so.

    Return its name for `Reference`.

    Args:
        scales: what stored keys and values are multiplied with.
    """
    of_keys, of_values = scales

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> Any:
        key = storing(key / of_keys, form) * of_keys
        value = storing(value / of_values, form) * of_values
        return eager_attention_forward(module, query, key, value, *args, **kw)

    name = f"{storing.__name__} {form} {scales}"
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, eager_mask)
    return name


class Paged:
    """Attention of answers to stored entries, and of prompts to exact ones."""

    def __init__(
        self,
        model: Path,
        name: str,
        kept: Callable[[Tensor], Tensor],
        new: Callable[[Tensor], Tensor],
    ) -> None:
        """
        Args:
            kept: returns a prompt's numbers [..., D] as a compression stores them.
            new: returns those of new tokens as an engine does.
        """
        self._kept = kept
        self._new = new
        self._prompt_tokens = 0
        name = f"paged {name}"
        AttentionInterface.register(name, self._attend)
        AttentionMaskInterface.register(name, eager_mask)
        self.reference = Reference(model, name)

    def for_prompt_of(self, tokens: int) -> Reference:
        self._prompt_tokens = tokens
        return self.reference

    def assert_near(self, result: Result, kept_at: list[Tensor | None] | None = None) -> None:
        assert_near_reference(result, self.for_prompt_of(len(result.prompt)), kept_at)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kw: Any
    ) -> tuple[Tensor, Tensor | None]:
        n = self._prompt_tokens
        output, weights = eager_attention_forward(module, query, key, value, *args, **kw)
        key, value = self._stored(key), self._stored(value)
        answers, _ = eager_attention_forward(module, query, key, value, *args, **kw)
        return torch.cat((output[:, :n], answers[:, n:]), dim=1), weights

    def _stored(self, numbers: Tensor) -> Tensor:
        n = self._prompt_tokens
        return torch.cat((self._kept(numbers[:, :, :n]), self._new(numbers[:, :, n:])), dim=2)
