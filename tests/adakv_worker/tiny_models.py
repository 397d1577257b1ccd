"""Small random models of several families, each with a reference that has the same weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tests.adakv_worker.engines import VOCABULARY, Reference

_SEED = 11
# Sharp enough logits to tell tokens apart.
_INITIAL_RANGE = 0.15
# Entries of a weight that share a scale.
_GROUP = 32
_NO_SPECIAL_TOKENS: dict[str, Any] = {
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_ATTENTION_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_LORA_RANK = 8


class TinyModel(NamedTuple):
    """A checkpoint that vLLM loads, and the same model for Hugging Face.

    path: of the checkpoint.
    plain: of the checkpoint whose weights are matrices; `path` unless they are packed there.
    options: what its engine needs.
    tolerance: by how much log-probabilities may differ.
    """

    path: Path
    plain: Path
    options: dict[str, Any]
    tolerance: float = 1e-3

    @property
    def reference(self) -> Reference:
        return Reference(self.plain)


def gqa(folder: Path) -> TinyModel:
    return _saved(_llama(heads=4, kv_heads=2), folder)


def mqa(folder: Path) -> TinyModel:
    return _saved(_llama(heads=4, kv_heads=1), folder)


def opt(folder: Path) -> TinyModel:
    """Make a model without a rotary embedding, whose output projection is `out_proj`."""
    torch.manual_seed(_SEED)
    config = OPTConfig(
        vocab_size=VOCABULARY, hidden_size=128, ffn_dim=256, num_hidden_layers=3,
        num_attention_heads=4, max_position_embeddings=2048, word_embed_proj_dim=128,
        init_std=_INITIAL_RANGE, dropout=0.0, **_NO_SPECIAL_TOKENS,
    )  # fmt: skip
    return _saved(OPTForCausalLM(config), folder)


def gpt2(folder: Path) -> TinyModel:
    """Make a model without a rotary embedding, whose output projection is `c_proj`."""
    torch.manual_seed(_SEED)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=128, n_layer=3, n_head=4, n_positions=2048,
        initializer_range=_INITIAL_RANGE, **_NO_SPECIAL_TOKENS,
    )  # fmt: skip
    return _saved(GPT2LMHeadModel(config), folder)


def gpt_j(folder: Path) -> TinyModel:
    """Make a model that rotates neighbouring dimensions, and only a part of each head."""
    torch.manual_seed(_SEED)
    config = GPTJConfig(
        vocab_size=VOCABULARY, n_embd=128, n_layer=3, n_head=4, n_positions=2048, rotary_dim=16,
        initializer_range=_INITIAL_RANGE, tie_word_embeddings=False, **_NO_SPECIAL_TOKENS,
    )  # fmt: skip
    return _saved(GPTJForCausalLM(config), folder)


def phi3_longrope(folder: Path) -> TinyModel:
    """Make a model whose rotary embedding has a table of another kind."""
    torch.manual_seed(_SEED)
    config = Phi3Config(
        vocab_size=VOCABULARY, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        original_max_position_embeddings=2048, initializer_range=_INITIAL_RANGE,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 10000.0, "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 2048,
            "short_factor": [1.0 + index / 16 for index in range(16)],
            "long_factor": [2.0 + index / 8 for index in range(16)],
        },
        **_NO_SPECIAL_TOKENS,
    )  # fmt: skip
    return _saved(Phi3ForCausalLM(config), folder)


def w4a16(folder: Path) -> TinyModel:
    """Make a Llama whose linear layers have packed weights of 4 bits, as compressed-tensors do."""
    model = _llama(heads=4, kv_heads=2).half()
    packed = dict(model.state_dict())
    for name, linear in _block_linears(model):
        quantized, scales = _quantized(linear.weight)
        linear.weight.data = _dequantized(quantized, scales)
        del packed[f"{name}.weight"]
        packed[f"{name}.weight_packed"] = _packed(quantized)
        packed[f"{name}.weight_scale"] = scales
        packed[f"{name}.weight_shape"] = torch.tensor(linear.weight.shape)
    plain = _saved(model, folder / "plain", "float16").path
    settings = json.loads((plain / "config.json").read_text())
    weights = {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": _GROUP, "symmetric": True,
    }  # fmt: skip
    settings["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    save_file({n: t.contiguous() for n, t in packed.items()}, folder / "model.safetensors")
    return TinyModel(folder, plain, {"dtype": "float16"}, 0.05)


class Adapter(NamedTuple):
    """A LoRA adapter of a model's attention; `merged` is the model with it."""

    path: Path
    merged: TinyModel


def lora(folder: Path) -> tuple[TinyModel, Adapter]:
    """Make a Llama and an adapter to each projection of its attention."""
    base = _saved(_llama(heads=4, kv_heads=2), folder / "base")
    model = _llama(heads=4, kv_heads=2)
    settings = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": _LORA_RANK, "lora_alpha": _LORA_RANK,
        "target_modules": list(_ATTENTION_PROJECTIONS), "bias": "none", "lora_dropout": 0.0,
        "base_model_name_or_path": str(base.path),
    }  # fmt: skip
    tensors = {}
    for name, linear in _block_linears(model):
        if not name.endswith(_ATTENTION_PROJECTIONS):
            continue
        up = torch.randn(linear.out_features, _LORA_RANK) * 0.1
        down = torch.randn(_LORA_RANK, linear.in_features) * 0.1
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        linear.weight.data += up @ down
    adapter = folder / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, adapter / "adapter_model.safetensors")
    # vLLM's CPU kernels apply the last slot's adapter to requests without one: leave it empty.
    options = {"enable_lora": True, "max_lora_rank": _LORA_RANK, "max_loras": 2}
    return base._replace(options=options), Adapter(adapter, _saved(model, folder / "merged"))


MODELS: dict[str, Callable[[Path], TinyModel]] = {
    "gqa": gqa, "mqa": mqa, "opt": opt, "gpt2": gpt2, "gpt_j": gpt_j,
    "phi3_longrope": phi3_longrope, "w4a16": w4a16, "lora": lambda folder: lora(folder)[0],
}  # fmt: skip


def _llama(heads: int, kv_heads: int) -> LlamaForCausalLM:
    torch.manual_seed(_SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32 * heads, intermediate_size=256, num_hidden_layers=3,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=32,
        max_position_embeddings=4096, initializer_range=_INITIAL_RANGE,
        tie_word_embeddings=False, **_NO_SPECIAL_TOKENS,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _saved(model: PreTrainedModel, folder: Path, dtype: str = "float32") -> TinyModel:
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**settings, "torch_dtype": dtype}))
    return TinyModel(folder, folder, {"dtype": dtype})


def add_tokenizer(folder: Path) -> None:
    """Add a tokenizer of bytes, for what needs one: structured outputs and texts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [f"<{number}>" for number in range(VOCABULARY - len(alphabet))]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=special[0], bos_token=special[1]
    ).save_pretrained(folder)


def _block_linears(model: PreTrainedModel) -> Iterator[tuple[str, nn.Linear]]:
    """Yield all linear layers but the output embedding."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            yield name, module


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return numbers from -8 to 7 [out, in] and the scales [out, in / group] of a weight."""
    groups = weight.detach().float().unflatten(1, (-1, _GROUP))
    scales = (groups.abs().amax(dim=-1) / 7).to(weight.dtype)
    numbers = (groups / scales.float()[..., None]).round().clamp(-8, 7)
    return numbers.flatten(1).int(), scales


def _dequantized(numbers: Tensor, scales: Tensor) -> Tensor:
    groups = numbers.unflatten(1, (-1, _GROUP)).float() * scales.float()[..., None]
    return groups.flatten(1).to(scales.dtype)


def _packed(numbers: Tensor) -> Tensor:
    """Return eight numbers of 4 bits [out, in] in each of [out, in / 8] int32, the first lowest."""
    shifts = torch.arange(0, 32, 4)
    words = ((numbers.long() + 8).unflatten(1, (-1, 8)) << shifts).sum(dim=-1)
    return words.where(words < 2**31, words - 2**32).int()
