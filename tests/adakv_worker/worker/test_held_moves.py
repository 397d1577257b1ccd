"""Which held caches may leave a worker."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from adakv_worker.config import CompressionConfig
from adakv_worker.options import budget_of
from adakv_worker.session_messages import Found, HeldCard, scope_of
from adakv_worker.worker.held_moves import HeldMoves

NOW_S, IDLE_S = 10_000.0, 3600.0
TOKENS = np.arange(300, dtype=np.int32).tobytes()
# That of a request without options.
SCOPE = scope_of(budget_of(None, CompressionConfig(), {}), None, None)


def card(held_at_s: float = NOW_S, **fields: Any) -> HeldCard:
    return HeldCard(SCOPE, TOKENS, 300, 200, 100, 250, 1, True, held_at_s=held_at_s, **fields)


def moves_of(**cards: HeldCard) -> HeldMoves:
    held: Any = SimpleNamespace(cards=cards, nbytes=lambda name: 7)
    kind: Any = SimpleNamespace(ranks=2)
    files: Any = None
    return HeldMoves(held, kind, CompressionConfig(), {}, files, clock=lambda: NOW_S)


def test_caches_of_adapters_stay_where_they_are() -> None:
    moves = moves_of(plain=card(), adapter=card(has_adapter=True), newest=card())
    assert [Found(*fields) for fields in moves.list()] == [
        Found("newest", 300, 14), Found("plain", 300, 14),
    ]  # fmt: skip


def test_a_cache_that_nobody_has_used_for_long_neither_leaves_nor_is_found() -> None:
    young, old = card(NOW_S - IDLE_S), card(NOW_S - IDLE_S - 1.0)
    assert moves_of(one=young).find(None, None, TOKENS) == [*Found("one", 299, 14)]
    assert len(moves_of(one=young).list()) == 1
    assert moves_of(one=old).find(None, None, TOKENS) is None
    assert moves_of(one=old).list() == []
