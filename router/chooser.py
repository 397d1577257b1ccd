"""The choice of a replica for a request, with its reasons."""

import random
from collections.abc import Collection, Hashable, Sequence
from typing import NamedTuple

from adakv_serve.router.affinity import PrefixAffinity
from adakv_serve.router.footprint import Footprint
from adakv_serve.router.ledger.prefixes import PrefixChange
from adakv_serve.router.local_view import LocalView
from adakv_serve.router.score import Score, Speeds, ranked, reason, score
from adakv_serve.router.session_hints import LastTurn, SessionHints

# Blocks of a prompt for which a replica with sessions has one block: it may hold them compressed.
_BLOCKS_OF_A_HELD_BLOCK = 16
# Most blocks to remember of all replicas, some 350 bytes each.
_MOST_BLOCKS = 1_000_000
# Most replicas in the random sample that is scored. Its best is hardly worse than the fleet's, a
# decision stays well under a millisecond, and routers do not all pick the same replica.
_SHORTLIST = 48
# The most replicas outside the sample that are scored because they hold the prefix.
_HOLDERS = 8


class Decision(NamedTuple):
    """Replicas and their scores, best first."""

    replica_ids: list[str]
    scores: list[Score]
    reason: str

    @property
    def holder(self) -> str | None:
        """The replica that probably has most of the prompt cached, or None."""
        most = max(self.scores, key=lambda score: score.cached_tokens)
        return most.replica_id if most.cached_tokens else None

    def log_line(self, footprint: Footprint) -> dict[str, object]:
        """Return the fields of the decision's log line."""
        return {
            "reason": self.reason,
            "replica": self.replica_ids[0],
            "peak_blocks": footprint.peak_blocks,
            "steady_blocks": footprint.steady_blocks,
            "prompt_tokens": footprint.prompt_tokens,
            "output_tokens": footprint.output_tokens,
            "candidates": [
                {
                    "replica": s.replica_id,
                    "total_s": round(s.total_s, 3),
                    "memory_s": round(s.memory_s, 3),
                    "prefill_s": round(s.prefill_s, 3),
                    "decode_s": round(s.decode_s, 3),
                    "cached_tokens": s.cached_tokens,
                    "fits": s.fits,
                }
                for s in self.scores
            ],
        }


class Chooser:
    """Ranking of replicas by their scores, with bookings and prefixes of the requests sent."""

    def __init__(
        self,
        view: LocalView,
        speeds: Speeds | None = None,
        block_size_tokens: int = 32,
        rng: random.Random | None = None,
        *,
        holds_sessions: bool = False,
    ) -> None:
        """
        Args:
            holds_sessions: whether replicas hold compressed caches of requests that have ended.
        """
        self.view = view
        self._blocks_per_block = _BLOCKS_OF_A_HELD_BLOCK if holds_sessions else 1
        self._speeds = speeds or Speeds()
        self._block_size_tokens = block_size_tokens
        self._affinity = PrefixAffinity()
        self._sessions = SessionHints()
        self._rng = rng or random.Random()

    def choose(
        self, request_id: Hashable, replica_ids: Sequence[str], footprint: Footprint, now_s: float
    ) -> Decision | None:
        """Rank the replicas with a fresh report for a request; return None if there are none.

        In a large fleet it ranks a random sample and replicas that hold the request's prefix. It
        books the request on the best at once, so that the next decisions count it. Where no
        replica is known to have the prefix, the one with the session's last turn counts as having
        it.
        """
        # An earlier choice may have found its replica full.
        self.view.unbook(request_id)
        hashes = footprint.block_hashes
        holders = self._affinity.holders(hashes)
        # What replicas report of known tokens is more exact.
        hint = None if hashes else self._sessions.last_turn(footprint.session)
        if hint is not None:
            holders = {hint.replica_id}
        views = self.view.views(self._shortlist(replica_ids, holders), now_s)
        if not views:
            return None
        scores = ranked(
            [
                score(
                    view,
                    footprint,
                    self._cached_tokens(view.replica_id, hashes, hint),
                    self._speeds,
                )
                for view in views
            ]
        )
        best = scores[0]
        self.view.book(request_id, best.replica_id, footprint, now_s, best.cached_tokens)
        why = reason(scores[0], scores[1:])
        if why == "affinity" and hint is not None:
            why = "session"
        return Decision([one.replica_id for one in scores], scores, why)

    def sent(
        self, request_id: Hashable, replica_id: str, footprint: Footprint, now_s: float
    ) -> None:
        """Book the request on the replica that got it, as chosen or not."""
        hashes = footprint.block_hashes
        hint = None if hashes else self._sessions.last_turn(footprint.session)
        cached_tokens = self._cached_tokens(replica_id, hashes, hint)
        self.view.book(request_id, replica_id, footprint, now_s, cached_tokens)
        if footprint.session is not None:
            self._sessions.note(footprint.session, replica_id, footprint.prompt_tokens)
        if footprint.block_hashes:
            self._affinity.note(replica_id, footprint.block_hashes, self._most_blocks(replica_id))

    def learn(self, change: PrefixChange) -> None:
        """Correct the affinity by a report of the replica's prefix cache."""
        replica_id = change.replica_id
        if change.cleared:
            self._affinity.forget(replica_id)
        self._affinity.discard(replica_id, change.removed)
        self._affinity.note(replica_id, change.stored, self._most_blocks(replica_id))

    def _most_blocks(self, replica_id: str) -> int:
        """Return the most prefix blocks to remember of a replica."""
        share = _MOST_BLOCKS // max(1, len(self.view.replica_ids))
        return min(share, self._blocks_per_block * self.view.blocks_total(replica_id))

    def retain(self, replica_ids: Collection[str]) -> None:
        """Forget all replicas but these."""
        for gone in {*self.view.replica_ids, *self._affinity.replica_ids}.difference(replica_ids):
            self.view.withdraw(gone)
            self._affinity.forget(gone)

    def _shortlist(self, replica_ids: Sequence[str], holders: Collection[str]) -> Sequence[str]:
        # The random order spreads requests over replicas of equal scores.
        picked = self._rng.sample(replica_ids, min(len(replica_ids), _SHORTLIST))
        if len(picked) < len(replica_ids) and holders:
            others = set(replica_ids).difference(picked)
            picked += sorted(others.intersection(holders))[:_HOLDERS]
        return picked

    def _cached_tokens(self, replica_id: str, hashes: Sequence[int], hint: LastTurn | None) -> int:
        if hint is not None:
            return hint.prompt_tokens if hint.replica_id == replica_id else 0
        return self._affinity.cached_blocks(replica_id, hashes) * self._block_size_tokens
