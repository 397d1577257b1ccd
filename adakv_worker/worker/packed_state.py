"""A compressed request's cache in transit: dense arrays with a header and a checksum."""

import hashlib
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from adakv_worker.messages import StateRefused
from adakv_worker.session_messages import TokenIds
from adakv_worker.worker.windows import Window

DIGEST_BYTES = 16
# Columns of words that a checksum adds up, at memory speed, before it hashes the sums.
_COLUMNS = 4096


class CompressedState(NamedTuple):
    """A copy of one request's compressed cache, for a move.

    lens: [L, H] int32. keys, values: [pages, page_tokens * D], layer by layer and head by head,
    each page packed as in the cache that it comes from.
    window: queries for the next eviction, of tokens that are already cached.
    """

    lens: Tensor
    keys: Tensor
    values: Tensor
    window: Window | None = None

    def without_last(self, tokens: int, page_tokens: int) -> "CompressedState":
        """Return the state without the last `tokens` entries of each head, and without a window."""
        if not tokens:
            return self._replace(window=None)
        lens = self.lens - tokens
        before, after = (-(-n.reshape(-1).long() // page_tokens) for n in (self.lens, lens))
        # The first pages of each head stay.
        ends = before.cumsum(0)
        place = torch.arange(len(self.keys)) - (ends - before).repeat_interleave(before)
        stay = (place < after.repeat_interleave(before)).to(self.keys.device)
        return CompressedState(lens, self.keys[stay], self.values[stay])


class StateHeader(NamedTuple):
    """Origin of a state, which a worker with an equal header can restore.

    fingerprint: weights, settings and software, see `adakv_worker.worker.fingerprint`.
    dtype: of the pools; the fingerprint names a quantized cache's numbers. query_dtype: of windows.
    head_dim: numbers of a query's head. entry_size: numbers of a pool that hold an entry's keys or
        values, and its scale if it has one.
    packing: order of the entries in a page, which depends on the attention kernels.
    ranks, rank: number of tensor-parallel workers, and the state's one; `heads` are its KV heads.
    policy: the policy that selected the entries; the scope of a held cache, which names it, too.
    token_hash: hash of the cached token ids, see `hash_tokens`.
    """

    model: str
    fingerprint: str
    dtype: str
    query_dtype: str
    page_tokens: int
    packing: str
    layers: int
    heads: int
    head_dim: int
    entry_size: int
    rank: int
    ranks: int
    policy: str
    token_hash: str


class PackedState(NamedTuple):
    """A state as contiguous arrays, which can be mapped without a copy.

    lens: [L, H] int32. keys, values: [pages, bytes of a page's keys or values] uint8.
    queries: bytes of a window's queries, empty without one. window: its tokens and its span.
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


def hash_tokens(token_ids: Sequence[int] | TokenIds) -> str:
    content = np.asarray(token_ids, dtype=np.int32).tobytes()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def pack(state: CompressedState, header: StateHeader) -> PackedState:
    """View a state's tensors as arrays, and compute their checksum."""
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
    """View the arrays as tensors again.

    The tensors may be read-only memory: copy from them, never write to them.

    Raises:
        StateRefused: the header differs from the expected one, or the content is damaged.
    """
    for name, theirs, ours in zip(StateHeader._fields, packed.header, expected, strict=True):
        if theirs != ours:
            raise StateRefused(f"the state has {name} {theirs!r}, here it is {ours!r}")
    if packed.checksum != _checksum(packed):
        raise StateRefused("the state's content differs from its checksum")
    dtype = getattr(torch, expected.dtype)
    size = expected.page_tokens * expected.entry_size
    keys, values = (
        _tensor(array).view(dtype).view(-1, size) for array in (packed.keys, packed.values)
    )
    return CompressedState(_tensor(packed.lens), keys, values, _window(packed))


def _window(packed: PackedState) -> Window | None:
    tokens, span = packed.window
    if span == 0:
        return None
    header, flat = packed.header, _tensor(packed.queries)
    dtype: torch.dtype = getattr(torch, header.query_dtype)
    queries = flat.view(dtype).view(header.layers, span, -1, header.head_dim)
    return Window(tokens, span, queries)


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().contiguous().view(torch.uint8).numpy()


def _tensor(array: np.ndarray) -> Tensor:
    with warnings.catch_warnings():
        # The memory may be read-only, as that of an object store; no caller writes to it.
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
