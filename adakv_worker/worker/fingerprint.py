"""A name for what a cache depends on beside its tokens: weights, settings, vLLM and this plug-in.

Two engines with equal fingerprints may exchange caches. After a change of weights at the same path,
or of the software, engines of before and of after may not.
"""

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import vllm
from huggingface_hub import snapshot_download

from adakv_worker.stored_dtypes import page_cache_dtype

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf")
_ROOMS = ("adakv_worker", "adakv_serve/kernels")
# Parts of a weight file that count: other training changes nearly every byte.
_PARTS = 64
_PART_BYTES = 4096


def fingerprint(config: "VllmConfig") -> str:
    """Return the fingerprint of an engine's caches.

    It covers samples of the checkpoint's files, and not weights that are replaced in memory later.
    Where the checkpoint is not on this node, its name and revision stand for it.
    """
    model = config.model_config
    settings = (
        model.revision, str(model.dtype), model.quantization, config.load_config.load_format,
        config.cache_config.cache_dtype, page_cache_dtype(config),
        # With overrides, such as those of rotary embeddings.
        model.hf_config.to_json_string(),
    )  # fmt: skip
    digest = hashlib.blake2b(repr((vllm.__version__, settings)).encode(), digest_size=16)
    root = Path(__file__).parents[2]
    for name in _ROOMS:
        _add_texts(digest, root / name)
    if (checkpoint := _checkpoint(config)) is not None:
        for part in weight_samples(checkpoint):
            digest.update(part)
    return digest.hexdigest()


def _checkpoint(config: "VllmConfig") -> Path | None:
    model = config.model_config
    if (path := Path(model.model)).exists():
        return path
    try:
        folder = snapshot_download(
            model.model,
            revision=model.revision,
            cache_dir=config.load_config.download_dir,
            local_files_only=True,
        )
    except Exception:
        # It may come from an object store.
        return None
    return Path(folder)


def _add_texts(digest: "hashlib.blake2b", room: Path) -> None:
    for file in sorted(room.rglob("*.py")):
        digest.update(f"{file.relative_to(room)} ".encode())
        digest.update(file.read_bytes())


def weight_samples(checkpoint: Path) -> Iterator[bytes]:
    """Yield name, size and parts of each weight file of a folder, or of the one file."""
    files = [checkpoint] if checkpoint.is_file() else sorted(checkpoint.rglob("*"))
    for file in files:
        if file.suffix in _WEIGHTS and file.is_file():
            size = file.stat().st_size
            name = "" if file == checkpoint else file.relative_to(checkpoint).as_posix()
            yield f"{name} {size} ".encode()
            with file.open("rb") as content:
                for part in range(_PARTS + 1):
                    content.seek(max(0, size - _PART_BYTES) * part // _PARTS)
                    yield content.read(_PART_BYTES)
