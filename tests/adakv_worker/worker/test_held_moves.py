"""Which held caches may leave a worker."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from adakv_worker.config import CompressionConfig
from adakv_worker.session_messages import Found, HeldCard
from adakv_worker.worker.held_moves import HeldMoves


def card(**fields: Any) -> HeldCard:
    tokens = np.arange(300, dtype=np.int32).tobytes()
    return HeldCard("scope", tokens, 300, 200, 100, 250, 1, True, **fields)


def test_caches_of_adapters_stay_where_they_are() -> None:
    cards = {"plain": card(), "adapter": card(has_adapter=True), "newest": card()}
    held: Any = SimpleNamespace(cards=cards, nbytes=lambda name: 7)
    kind: Any = SimpleNamespace(ranks=2)
    files: Any = None
    moves = HeldMoves(held, kind, CompressionConfig(), {}, files)
    assert [Found(*fields) for fields in moves.list()] == [
        Found("newest", 300, 14), Found("plain", 300, 14),
    ]  # fmt: skip
