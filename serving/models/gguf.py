"""Conversion of quantized models in GGUF files to plain safetensors."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def dequantize(folder: Path, gguf_file: str, target: Path, dtype: "torch.dtype") -> None:
    """Write the weights, configuration and tokenizer of `folder / gguf_file` to `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype)
    # A model loaded from GGUF refuses `save_pretrained`, so a plain one takes over its weights.
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    with torch.device("meta"):
        plain = type(quantized)(type(quantized.config)(**settings))
    plain.load_state_dict(quantized.state_dict(), assign=True)
    plain.tie_weights()
    plain.save_pretrained(target)
    _make_greedy(target / "generation_config.json")
    AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file).save_pretrained(target)


def _make_greedy(path: Path) -> None:
    # With sampling, a model this small sometimes misses the answer and rambles until the context
    # ends. Written by hand, because transformers refuses to save a temperature of 0.
    settings = {**json.loads(path.read_text()), "do_sample": False, "temperature": 0.0}
    path.write_text(json.dumps(settings, indent=2) + "\n")
