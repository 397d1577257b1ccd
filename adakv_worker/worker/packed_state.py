"""A compressed request's cache as it travels: dense arrays, what they are of, and a checksum."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adakv_worker.messages import StateRefused
from adakv_worker.worker.compression import Window
from adakv_worker.worker.requests import CompressedState

DIGEST_BYTES = 16
# A checksum adds up columns of so many words at memory's speed, and hashes the sums.
_COLUMNS = 4096


class StateHeader(NamedTuple):
    """What a state is of. It can be restored where all of it is the same.

    packing: order of the entries in a page, which is the kernels' own.
    ranks, rank: tensor-parallel workers, and whose part it is; `heads` are that part's KV heads.
    policy: by which its entries were chosen.
    token_hash: of the token ids that the cache is of, see `hash_tokens`.
    """

    model: str
    dtype: str
    page_tokens: int
    packing: str
    layers: int
    heads: int
    head_dim: int
    rank: int
    ranks: int
    policy: str
    token_hash: str


class PackedState(NamedTuple):
    """Contiguous arrays, so that an object store maps them without a copy.

    lens: [L, H] int32. keys, values: [pages, bytes of a page's keys or values] uint8.
    queries: bytes of a window's, none where there is none. window: its tokens and its span.
    """

    header: StateHeader
    checksum: bytes
    lens: np.ndarray
    keys: np.ndarray
    values: np.ndarray
    queries: np.ndarray
    window: tuple[int, int] = (0, 0)

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.lens, self.keys, self.values, self.queries

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays)


def hash_tokens(token_ids: Sequence[int]) -> str:
    content = np.asarray(token_ids, dtype=np.int32).tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def pack(state: CompressedState, header: StateHeader) -> PackedState:
    """Views the state's tensors as arrays: nothing is copied but to compute the checksum."""
    window = state.window
    packed = PackedState(
        header,
        b"",
        _bytes(state.lens).view(np.int32),
        _bytes(state.keys),
        _bytes(state.values),
        np.empty(0, dtype=np.uint8) if window is None else _bytes(window.queries).reshape(-1),
        (0, 0) if window is None else (window.prompt_tokens, window.span),
    )
    return packed._replace(checksum=_checksum(packed))


def unpack(packed: PackedState, expected: StateHeader) -> CompressedState:
    """Views the arrays as tensors again, if they are what is expected.

    The tensors may be read-only memory: they are to be copied from, never written to.

    Raises:
        StateRefused: naming what differs, or that the content does.
    """
    for name, theirs, ours in zip(StateHeader._fields, packed.header, expected, strict=True):
        if theirs != ours:
            raise StateRefused(f"the state has {name} {theirs!r}, here it is {ours!r}")
    if packed.checksum != _checksum(packed):
        raise StateRefused("the state's content differs from its checksum")
    dtype = getattr(torch, expected.dtype)
    size = expected.page_tokens * expected.head_dim
    keys, values = (
        _tensor(array).view(dtype).view(-1, size) for array in (packed.keys, packed.values)
    )
    return CompressedState(_tensor(packed.lens), keys, values, _window(packed, dtype))


def _window(packed: PackedState, dtype: torch.dtype) -> Window | None:
    tokens, span = packed.window
    if span == 0:
        return None
    header = packed.header
    queries = _tensor(packed.queries).view(dtype).view(header.layers, span, -1, header.head_dim)
    return Window(tokens, span, queries)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().contiguous().view(torch.uint8).numpy()


def _tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # Of memory that must not be written to, as an object store's: nobody is going to.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _checksum(packed: PackedState) -> bytes:
    about = packed.header, tuple(packed.window)
    digest = hashlib.blake2b(repr(about).encode(), digest_size=DIGEST_BYTES)
    for array in packed.arrays:
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        digest.update(f"{array.nbytes} ".encode())
        whole = len(content) // (8 * _COLUMNS) * (8 * _COLUMNS)
        sums = content[:whole].view(np.uint64).reshape(-1, _COLUMNS).sum(axis=0, dtype=np.uint64)
        digest.update(sums.tobytes())
        digest.update(content[whole:].tobytes())
    return digest.digest()
