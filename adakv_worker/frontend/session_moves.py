"""Held caches that leave an engine or come to it, on the side of its front end."""

import asyncio
import time
import uuid
from array import array
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from typing import Any, NamedTuple, Self

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from adakv_worker.frontend.moving import MovingCore
from adakv_worker.session_messages import ARRIVAL_KEY, Found, HeldCard


class ProbableHolder:
    """The replica that probably holds a cache for an HTTP request.

    vLLM makes many engine requests of one that has several prompts or a beam search, in tasks of
    their own. The first of them asks for the cache; for others it would be the same one.
    """

    def __init__(self, replica_id: str) -> None:
        self._replica_id: str | None = replica_id

    def take(self) -> str | None:
        """Return the replica the first time, and then None."""
        taken, self._replica_id = self._replica_id, None
        return taken


# A task that works for no HTTP request has none.
probable_holder: ContextVar[ProbableHolder | None] = ContextVar("adakv_holder", default=None)


class SessionAsk(NamedTuple):
    """What another engine must know of a request to find a held cache for it. Plain data."""

    token_bytes: bytes
    extra_args: dict[str, Any] | None
    cache_salt: str | None

    @property
    def tokens(self) -> int:
        return len(self.token_bytes) // array("i").itemsize

    @classmethod
    def of(cls, request: EngineCoreRequest) -> Self | None:
        """Return what to ask for a request; None if it can begin with no cache from elsewhere."""
        params = request.sampling_params
        if (
            params is None
            or params.skip_reading_prefix_cache
            or request.prompt_token_ids is None
            or request.prompt_embeds is not None
            or request.mm_features
            or request.resumable
            # Engines number their adapters by themselves.
            or request.lora_request is not None
        ):
            return None
        ids = array("i", request.prompt_token_ids)
        return cls(ids.tobytes(), params.extra_args, request.cache_salt)


class SessionCore:
    """The held caches of one engine, for its front end and other engines."""

    def __init__(self, core: MovingCore) -> None:
        self._core = core

    def fetch_by(self, fetch: Callable[[str, SessionAsk], Awaitable[None]]) -> None:
        """Have `fetch` awaited with each request that probably has a held cache elsewhere.

        It gets the replica that holds the cache, and is awaited before the engine gets the request.
        """

        async def prepare(request: EngineCoreRequest) -> None:
            probable, ask = probable_holder.get(), SessionAsk.of(request)
            holder = probable.take() if probable is not None and ask is not None else None
            if holder is not None and ask is not None:
                await fetch(holder, ask)

        self._core.prepare = prepare

    async def find(self, ask: SessionAsk) -> Found | None:
        """Return the held cache that saves most of a request, or None.

        Raises:
            ConnectionError: the engine core has ended.
        """
        found = (await self._core.call_workers("adakv_find_held", (*_plain(ask),)))[0]
        return None if found is None else Found(*found)

    async def export_for(
        self, ask: SessionAsk, most_bytes_per_token: float, path: str
    ) -> tuple[Found, HeldCard] | None:
        """Write the held cache that saves most of a request to the files at `path`.

        Returns None if there is none, or none that is small enough for the tokens that it saves.
        Finding and writing are one call, because each waits for the end of a step.

        Raises:
            ConnectionError: the engine core has ended.
            Exception: a worker failed, as when it cannot write the cache.
        """
        arguments = (*_plain(ask), most_bytes_per_token, path)
        ranks = await self._core.call_workers("adakv_export_held_for", arguments)
        if any(rank is None for rank in ranks):
            return None
        fields, card = ranks[0]
        return Found(*fields), HeldCard.of_fields(card)

    async def held(self) -> list[Found]:
        """Return all held caches, the newest first.

        Raises:
            ConnectionError: the engine core has ended.
        """
        first_rank = (await self._core.call_workers("adakv_list_held", ()))[0]
        return [Found(*fields) for fields in first_rank]

    async def export(self, name: str, path: str) -> HeldCard | None:
        """Write a held cache to the files at `path`; None if it is not held any more.

        Raises:
            ConnectionError: the engine core has ended.
            Exception: a worker failed, as when it cannot write the cache.
        """
        cards = await self._core.call_workers("adakv_export_held", (name, path))
        if any(card is None for card in cards):
            return None
        return HeldCard.of_fields(cards[0])

    async def take_in(self, card: HeldCard, path: str) -> bool:
        """Hold a cache from the files at `path`, which are free afterwards.

        Returns whether it is held: a damaged one, or one of another model, is not. It goes on if
        the caller is cancelled, so that workers and scheduler know of the same caches; then the
        files may be removed, but not written.

        Raises:
            ConnectionError: the engine core has ended.
        """
        return await asyncio.shield(asyncio.create_task(self._take_in(card, path)))

    async def _take_in(self, card: HeldCard, path: str) -> bool:
        name = f"arrived-{uuid.uuid4().hex}"
        fields = card.as_fields()
        problems = await self._core.call_workers("adakv_arrive", (name, path, fields))
        if any(problems):
            await self._core.call_workers("adakv_forget_held", (name,))
            return False
        # The scheduler takes it as a request, the only way that leads there.
        params = SamplingParams(max_tokens=1, extra_args={ARRIVAL_KEY: fields})
        carrier = EngineCoreRequest(
            name,
            card.token_ids.tolist(),
            None,
            params,
            None,
            time.time(),
            None,
            card.cache_salt,
            None,
        )
        await self._core.bring(carrier)
        return True


def _plain(ask: SessionAsk) -> tuple[Any, ...]:
    return ask.extra_args, ask.cache_salt, ask.token_bytes
