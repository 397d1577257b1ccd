"""Compressed caches that leave a worker or arrive at it, by files in memory (a `tmpfs`).

Each tensor-parallel rank has a file of its own, with its rank as the suffix.
"""

import functools
import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from adakv_worker.messages import StateRefused
from adakv_worker.session_messages import TokenIds
from adakv_worker.worker.held_rows import Room
from adakv_worker.worker.mapped_files import MappedFiles
from adakv_worker.worker.packed_state import (
    DIGEST_BYTES,
    CompressedState,
    PackedState,
    StateHeader,
    hash_tokens,
    pack,
    unpack,
)
from adakv_worker.worker.requests import CompressionState
from adakv_worker.worker.windows import Window

_GENERATOR = "generator"
_LENGTH = struct.Struct("<Q")


class CacheKind(NamedTuple):
    """Properties that all caches of one worker share."""

    model: str
    fingerprint: str
    dtype: str
    query_dtype: str
    page_tokens: int
    layers: int
    heads: int
    head_dim: int
    entry_size: int
    rank: int
    ranks: int
    packing: str

    @property
    def name(self) -> str:
        """Return a name that engines share which can read each other's caches."""
        shared = self._replace(rank=0)
        return hashlib.blake2b(repr(tuple(shared)).encode(), digest_size=16).hexdigest()

    def header(self, policy: str, token_ids: Sequence[int] | TokenIds) -> StateHeader:
        """Return the header for the cache of these tokens."""
        return StateHeader(**self._asdict(), policy=policy, token_hash=hash_tokens(token_ids))


class Moved(NamedTuple):
    """A request's cache, and the state of its random numbers if it has a seed."""

    cache: CompressedState
    generator: Tensor | None


class MovableBatch(Protocol):
    """The part of a runner's batch that a move needs: see `adakv_worker.worker.step.Batch`."""

    def tokens(self, request_id: str) -> list[int] | None: ...

    def random_state(self, request_id: str) -> Tensor | None: ...


class Moves:
    """Exports of one worker's compressed requests, and caches staged for requests to come.

    staged: caches that have arrived, by the name they came with.
    kind: properties of the caches.
    files: their files, mapped.
    """

    def __init__(self, state: CompressionState, batch: MovableBatch, kind: CacheKind) -> None:
        self.staged: dict[str, Moved] = {}
        self._state = state
        self._batch = batch
        self.kind = kind
        self.files = MappedFiles()

    def export(self, request_id: str, path: str, policy: str) -> list[int] | None:
        """Write a compressed request's cache to this rank's file, between two steps.

        Returns all its tokens so far, of which the last is not in the cache; None if the request
        is not here or not compressed, or its prompt not complete.

        Raises:
            OSError: there is no room for the file.
        """
        tokens = self._batch.tokens(request_id)
        if tokens is None or not self._state.is_compressed(request_id):
            return None
        random, window = self._batch.random_state(request_id), self._state.windows.get(request_id)
        # The last token is not computed yet.
        header = self.kind.header(policy, tokens[:-1])
        file = rank_file(path, self.kind.rank)
        export = functools.partial(self._state.export, request_id)
        write_state(export, header, file, self.files, window, random)
        return tokens

    def stage(self, name: str, path: str, policy: str, token_ids: list[int]) -> str | None:
        """Hold a cache ready for the request with these tokens; return the reason of a refusal.

        The file must last until the request has begun, or until `unstage`.
        """
        header = self.kind.header(policy, token_ids[:-1])
        try:
            self.staged[name] = read_state(rank_file(path, self.kind.rank), header, self.files)
        except StateRefused as error:
            return str(error)
        return None

    def unstage(self, name: str) -> None:
        """Drop a staged cache, if it is still there."""
        self.staged.pop(name, None)


def rank_file(path: str, rank: int) -> Path:
    return Path(f"{path}.{rank}")


def write_state(
    export: Callable[[Room], CompressedState],
    header: StateHeader,
    path: Path,
    files: MappedFiles,
    window: Window | None = None,
    generator: Tensor | None = None,
) -> None:
    """Copy a compressed cache into a file in memory, over its old content.

    The format is that of safetensors: the length of a JSON text, the text, and the data.

    Args:
        export: copies the cache to memory for so many pages.
        window: the cache's window, if it has one.
        generator: the state of its request's random numbers.

    Raises:
        OSError: there is no room for the file.
    """
    parts: dict[str, Tensor] = {}
    about = {
        "header": json.dumps(header),
        "window": json.dumps((0, 0) if window is None else (window.prompt_tokens, window.span)),
    }
    dtype: torch.dtype = getattr(torch, header.dtype)
    page_bytes = header.page_tokens * header.entry_size * dtype.itemsize

    def room(pages: int) -> tuple[Tensor, Tensor]:
        sizes = {
            # Large parts first, which keeps them aligned.
            **dict.fromkeys(("keys", "values"), pages * page_bytes),
            "queries": 0 if window is None else window.queries.nbytes,
            "lens": 4 * header.layers * header.heads,
            "checksum": DIGEST_BYTES,
            _GENERATOR: 0 if generator is None else generator.numel(),
        }
        parts.update(_laid_out(path, sizes, about, files))
        keys, values = (parts[name].view(dtype).view(pages, -1) for name in ("keys", "values"))
        return keys, values

    packed = pack(export(room), header)
    parts["lens"].numpy()[:] = packed.lens.reshape(-1).view(np.uint8)
    parts["queries"].numpy()[:] = packed.queries
    parts["checksum"].numpy()[:] = np.frombuffer(packed.checksum, dtype=np.uint8)
    if generator is not None:
        parts[_GENERATOR].numpy()[:] = generator.numpy()


def _laid_out(
    path: Path, sizes: dict[str, int], about: dict[str, str], files: MappedFiles
) -> dict[str, Tensor]:
    """Return the memory of a file's parts as bytes, with the description written."""
    described: dict[str, object] = {"__metadata__": about}
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
    """Map a file; the returned tensors are its memory, which must not change meanwhile.

    Raises:
        StateRefused: the file is unreadable, damaged, or from another kind of cache.
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
    # A copy: a generator takes only memory that is aligned to eight bytes.
    generator = parts[_GENERATOR].clone() if len(parts[_GENERATOR]) else None
    return Moved(unpack(packed, expected), generator)
