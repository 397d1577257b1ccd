"""What a worker does when a compressed request moves: its cache goes to a file, or comes from one.

The files lie in memory (a `tmpfs`), where the replica maps them; each tensor-parallel rank has one
of its own, told by its rank as the suffix.
"""

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from adakv_worker.messages import StateRefused
from adakv_worker.worker.mapped_files import MappedFiles
from adakv_worker.worker.packed_state import (
    DIGEST_BYTES,
    PackedState,
    StateHeader,
    hash_tokens,
    pack,
    unpack,
)
from adakv_worker.worker.requests import CompressedState, CompressionState

_GENERATOR = "generator"
_LENGTH = struct.Struct("<Q")


class CacheKind(NamedTuple):
    """What the caches of all requests of one worker have in common."""

    model: str
    dtype: str
    page_tokens: int
    layers: int
    heads: int
    head_dim: int
    rank: int
    ranks: int
    packing: str

    def header(self, policy: str, token_ids: Sequence[int]) -> StateHeader:
        """Of a decoding request with these tokens, of which the last is yet to be computed."""
        return StateHeader(
            **self._asdict(),
            policy=policy,
            token_hash=hash_tokens(token_ids[:-1]),
        )


class Moved(NamedTuple):
    """A request's cache, and the state of its random numbers if it has a seed."""

    cache: CompressedState
    generator: Tensor | None


def rank_file(path: str, rank: int) -> Path:
    return Path(f"{path}.{rank}")


def write_state(
    state: CompressionState,
    request_id: str,
    generator: Tensor | None,
    header: StateHeader,
    path: Path,
    files: MappedFiles,
) -> None:
    """Copies a compressed request's cache into a file in memory, over what is there.

    The file is what safetensors writes: the length of a JSON text, the text, and what it describes.

    Raises:
        OSError: there is no room for it.
    """
    parts: dict[str, Tensor] = {}
    window = state.window(request_id)
    about = {
        "header": json.dumps(header),
        "window": json.dumps((0, 0) if window is None else (window.prompt_tokens, window.span)),
    }

    def room(pages: int) -> tuple[Tensor, Tensor]:
        dtype = getattr(torch, header.dtype)
        size = pages * header.page_tokens * header.head_dim * dtype.itemsize
        # The large ones first, which keeps them aligned.
        sizes = {
            "keys": size,
            "values": size,
            "queries": 0 if window is None else window.queries.nbytes,
            "lens": 4 * header.layers * header.heads,
            "checksum": DIGEST_BYTES,
            _GENERATOR: 0 if generator is None else generator.numel(),
        }
        parts.update(_laid_out(path, sizes, about, files))
        keys, values = (parts[name].view(dtype).view(pages, -1) for name in ("keys", "values"))
        return keys, values

    packed = pack(state.export(request_id, room), header)
    parts["lens"].numpy()[:] = packed.lens.reshape(-1).view(np.uint8)
    parts["queries"].numpy()[:] = packed.queries
    parts["checksum"].numpy()[:] = np.frombuffer(packed.checksum, dtype=np.uint8)
    if generator is not None:
        parts[_GENERATOR].numpy()[:] = generator.numpy()


def _laid_out(
    path: Path, sizes: dict[str, int], about: dict[str, str], files: MappedFiles
) -> dict[str, Tensor]:
    """The memory of a file's parts, all of bytes, with its description written already."""
    described: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, size in sizes.items():
        begin, end = end, end + size
        described[name] = {"dtype": "U8", "shape": [size], "data_offsets": [begin, end]}
    text = json.dumps(described).encode()
    text += b" " * (-(_LENGTH.size + len(text)) % 64)
    first = _LENGTH.pack(len(text)) + text
    content = files.write(path, len(first) + end)
    content[: len(first)].numpy()[:] = np.frombuffer(first, dtype=np.uint8)
    return dict(zip(sizes, content[len(first) :].split(list(sizes.values())), strict=True))


def read_state(path: Path, expected: StateHeader, files: MappedFiles) -> Moved:
    """Maps a file: the tensors are its memory, which must not change while they are used.

    Raises:
        StateRefused: it is no such file, of something else, or damaged.
    """
    try:
        content = files.read(path)
        (length,) = _LENGTH.unpack(content[: _LENGTH.size].numpy().tobytes())
        text, data = content[_LENGTH.size :].split([length, len(content) - _LENGTH.size - length])
        described = json.loads(text.numpy().tobytes())
        about = described.pop("__metadata__")
        header = StateHeader(*json.loads(about["header"]))
        tokens, span = json.loads(about["window"])
        parts = {name: data[slice(*part["data_offsets"])] for name, part in described.items()}
        lens = parts["lens"].view(torch.int32).view(header.layers, header.heads)
        packed = PackedState(
            header,
            parts["checksum"].numpy().tobytes(),
            lens.numpy(),
            parts["keys"].numpy(),
            parts["values"].numpy(),
            parts["queries"].numpy(),
            (tokens, span),
        )
    except Exception as error:
        raise StateRefused(f"the state cannot be read: {error}") from None
    # A copy: a generator takes only what lies at a multiple of eight bytes.
    generator = parts[_GENERATOR].clone() if len(parts[_GENERATOR]) else None
    return Moved(unpack(packed, expected), generator)
