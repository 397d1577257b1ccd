"""What crosses a process about sessions: held caches, and how requests begin with them."""

import hashlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from adakv_worker.options import RequestBudget

TokenIds = npt.NDArray[np.int32]

# The name in `SamplingParams.extra_args` of whose request it is, see `frontend.tenants`. Only a
# front end may set it: see `frontend.validator`.
TENANT_KEY = "adakv-tenant"
# Likewise: the card of a held cache that has arrived from another engine.
ARRIVAL_KEY = "adakv-arrival"
# Two prompts that differ mostly do so early: they are compared piece by piece.
_COMPARED_TOKENS = 1024
# The medium in vLLM's KV events of prompts whose compressed cache is held.
HELD_MEDIUM = "ADAKV_HELD"


class HeldCard(msgspec.Struct, frozen=True):
    """All that other processes know of a held cache.

    scope: see `scope_of`.
    token_bytes: ids, int32, of the tokens that its entries are of.
    entry_tokens: tokens that there are entries for; at most one more.
    floor_tokens, floor_entries: see `adakv_worker.core.floor.Floor`.
    compressed_at: tokens at its last compression.
    turn: compressions of prompts so far.
    is_named: whether routers may know which prompt it is of.
    cache_salt: the salt of its requests.
    has_session: whether its client names its session.
    has_adapter: whether a LoRA adapter has computed it: then it stays where it is.
    held_at_s: wall-clock time at which its request ended or was preempted.
    """

    scope: str
    token_bytes: bytes
    entry_tokens: int
    floor_tokens: int
    floor_entries: int
    compressed_at: int
    turn: int
    is_named: bool
    has_session: bool = False
    cache_salt: str | None = None
    has_adapter: bool = False
    held_at_s: float = 0.0

    @property
    def token_ids(self) -> TokenIds:
        return token_ids_of(self.token_bytes)

    def as_fields(self) -> dict[str, Any]:
        """Return the card as plain data, for vLLM's messages."""
        fields: dict[str, Any] = msgspec.to_builtins(self, builtin_types=(bytes,))
        return fields

    @classmethod
    def of_fields(cls, fields: object) -> "HeldCard":
        """Return the card again.

        Raises:
            msgspec.ValidationError: it is something else.
        """
        return msgspec.convert(fields, cls, builtin_types=(bytes,))


class Hold(NamedTuple):
    """Keep a request's cache under a name."""

    name: str
    card: HeldCard


class Resume(NamedTuple):
    """Give a request the held cache of that name, without its last `cut_tokens` tokens.

    tokens: those that are left.
    slabs: all the request's blocks. A cache in the pool that it takes has the first of them.
    copies: whether the cache stays held, and the request gets a copy.
    """

    held: str
    tokens: int
    cut_tokens: int
    slabs: list[int]
    copies: bool = False


class SessionCommands(NamedTuple):
    """What becomes of held caches, in this order and before anything is computed.

    hold: requests that end or pause in this step, and how their caches stay.
    park: held caches to copy to the host's memory: their blocks are taken.
    drop: held caches that are gone. Those that `resume` copies go after their last copy.
    resume: requests that begin with a held cache. One that copies it may be followed by another
        whose slabs are the cache's blocks.
    """

    hold: dict[str, Hold]
    park: list[str]
    drop: list[str]
    resume: dict[str, Resume]


class SessionProof(msgspec.Struct, frozen=True):
    """Record of the cache that one request began with.

    turn: compressed prompts in its cache, its own included.
    resumed_tokens: tokens whose entries the cache had. computed_tokens: those that were computed.
    source: where the cache was (`pool`, `host` or `replica`); None without one.
    skipped: why it began without one, or None.
    """

    turn: int
    resumed_tokens: int
    computed_tokens: int
    source: str | None = None
    skipped: str | None = None


class Found(NamedTuple):
    """A held cache that fits a request, the tokens that it saves, and its size."""

    name: str
    tokens: int
    nbytes: int


def scope_of(
    budget: RequestBudget,
    adapter: tuple[str, int, str] | None,
    cache_salt: str | None,
) -> str:
    """Return what two requests must have in common to share a cache, beside their tokens.

    Engines with the same settings return the same for the same request.

    Args:
        adapter: name, id and path of its LoRA adapter.
        cache_salt: its salt, which its tenant is part of.
    """
    # The order of a set differs between processes.
    of_budget = {**budget.model_dump(), "unsupported": sorted(budget.unsupported)}
    text = repr((of_budget, adapter, cache_salt))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def token_ids_of(token_bytes: bytes) -> TokenIds:
    """Return the ids, int32, in these bytes."""
    return np.frombuffer(token_bytes, dtype=np.int32)


def common_tokens(held: TokenIds, floor_tokens: int, asked: TokenIds) -> int:
    """Return how many tokens a held cache saves of a request; 0 where it does not fit.

    At least the request's last token is computed anew, for the first token of its answer.
    """
    most = min(len(held), len(asked) - 1)
    if most < floor_tokens:
        return 0
    common = most
    for start in range(0, most, _COMPARED_TOKENS):
        end = min(start + _COMPARED_TOKENS, most)
        different = np.flatnonzero(held[start:end] != asked[start:end])
        if len(different):
            common = start + int(different[0])
            break
    return common if common >= max(floor_tokens, 1) else 0


def arrival_in(extra_args: Mapping[str, Any] | None) -> HeldCard | None:
    """Return the card of an arrived cache beside a request's sampling parameters, or None.

    Raises:
        msgspec.ValidationError: there is something else under its name.
    """
    fields = (extra_args or {}).get(ARRIVAL_KEY)
    return None if fields is None else HeldCard.of_fields(fields)
