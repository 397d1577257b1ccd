"""Held caches that leave a worker or arrive at it, by files in memory."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from adakv_worker.config import CompressionConfig
from adakv_worker.messages import StateRefused
from adakv_worker.options import budget_of
from adakv_worker.session_messages import Found, HeldCard, common_tokens, scope_of, token_ids_of
from adakv_worker.worker.held_rows import HeldRows
from adakv_worker.worker.mapped_files import MappedFiles
from adakv_worker.worker.moves import CacheKind, rank_file, read_state, write_state


class HeldMoves:
    """Finds, exports and takes in held caches of one worker, between two steps.

    What it returns is plain data: it goes through vLLM's calls of workers.
    """

    def __init__(
        self,
        held: HeldRows,
        kind: CacheKind,
        config: CompressionConfig,
        unsupported: Mapping[str, str],
        files: MappedFiles,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """
        Args:
            unsupported: presets that the model does not support, with the reason.
            clock: the wall clock of `HeldCard.held_at_s`.
        """
        self._held = held
        self._kind = kind
        self._config = config
        self._unsupported = unsupported
        self._files = files
        self._clock = clock

    def _is_idle(self, card: HeldCard) -> bool:
        """Return whether a cache has been held for longer than `max_idle_s`.

        The scheduler drops such caches, but only in its next step.
        """
        return self._clock() - card.held_at_s > self._config.sessions.max_idle_s

    def _may_arrive(self, name: str) -> bool:
        """Return whether another replica, which is configured as this one is, takes a cache."""
        return self._held.nbytes(name) <= self._config.sessions.arrival_bytes

    def find(
        self, extra_args: dict[str, Any] | None, cache_salt: str | None, token_bytes: bytes
    ) -> list[Any] | None:
        """Return the fields of the `Found` that saves most of a request; None without one."""
        budget = budget_of(extra_args, self._config, self._unsupported)
        scope = scope_of(budget, None, cache_salt)
        asked = token_ids_of(token_bytes)
        name, most = "", 0
        for other, card in self._held.cards.items():
            if card.scope == scope and not self._is_idle(card):
                tokens = common_tokens(card.token_ids, card.floor_tokens, asked)
                name, most = (other, tokens) if tokens > most else (name, most)
        return [*Found(name, most, self._held.nbytes(name) * self._kind.ranks)] if name else None

    def export_for(
        self,
        extra_args: dict[str, Any] | None,
        cache_salt: str | None,
        token_bytes: bytes,
        most_bytes_per_token: float,
        path: str,
    ) -> list[Any] | None:
        """Find a request's cache and write it to this rank's file; return it with its card.

        Returns None if there is none, or none that is small enough for the tokens that it saves and
        for other replicas.

        Raises:
            OSError: there is no room for the file.
        """
        fields = self.find(extra_args, cache_salt, token_bytes)
        if fields is None:
            return None
        found = Found(*fields)
        if found.nbytes > most_bytes_per_token * found.tokens or not self._may_arrive(found.name):
            return None
        card = self.export(found.name, path)
        return None if card is None else [fields, card]

    def list(self) -> list[list[Any]]:
        """Return the fields of a `Found` for each cache that may move, the newest first."""
        return [
            [*Found(name, len(card.token_ids), self._held.nbytes(name) * self._kind.ranks)]
            for name, card in reversed([*self._held.cards.items()])
            if not card.has_adapter and not self._is_idle(card) and self._may_arrive(name)
        ]

    def export(self, name: str, path: str) -> dict[str, Any] | None:
        """Write a cache, which stays held, to this rank's file; return its card.

        Returns None if it is not held any more, or if its receiver has removed the folder.

        Raises:
            OSError: there is no room for the file.
        """
        card = self._held.cards.get(name)
        if card is None:
            return None
        header = self._kind.header(card.scope, card.token_ids)
        file = rank_file(path, self._kind.rank)
        if not file.parent.exists():
            return None
        write_state(lambda room: self._held.export(name, room), header, file, self._files)
        return card.as_fields()

    def arrive(self, name: str, path: str, fields: dict[str, Any]) -> str | None:
        """Copy a cache from this rank's file; return the reason of a refusal."""
        card = HeldCard.of_fields(fields)
        header = self._kind.header(card.scope, card.token_ids)
        try:
            state = read_state(rank_file(path, self._kind.rank), header, self._files).cache
        except StateRefused as error:
            return str(error)
        if state.keys.nbytes + state.values.nbytes > self._config.sessions.arrival_bytes:
            return "the cache is larger than sessions.arrival_bytes"
        # The file's memory is used again.
        copy = state._replace(
            lens=state.lens.clone(), keys=state.keys.clone(), values=state.values.clone()
        )
        self._held.arrive(name, card, copy)
        return None

    def forget(self, name: str) -> None:
        """Drop a cache that has arrived, if it is here."""
        if name in self._held.cards:
            self._held.drop(name)
