"""Models that come quantized in a GGUF file, written out as plain safetensors."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def dequantize(folder: Path, gguf_file: str, target: Path, dtype: "torch.dtype") -> None:
    """Writes weights, configuration and tokenizer of `folder / gguf_file` to `target`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantized: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file, dtype=dtype)
    # A model loaded from GGUF refuses `save_pretrained`; a plain one with its weights does not.
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
    # Sampled, so small a model now and then misses the answer and rambles until the context ends.
    # (transformers would refuse to save a temperature of 0.)
    settings = {**json.loads(path.read_text()), "do_sample": False, "temperature": 0.0}
    path.write_text(json.dumps(settings, indent=2) + "\n")
