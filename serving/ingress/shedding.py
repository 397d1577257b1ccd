"""Which requests give way when the queue in front of the replicas is full."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

from ray.serve.exceptions import BackPressureError

from adakv_serve.serving.http.failures import Overloaded

# How long a request tries again for which others give way. The pause between two calls grows.
_ROOM_S = 2.0
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 0.2
# Serve counts a request that gave way a little longer. Only then does another one give way.
_ANOTHER_S = 0.3
# Serve has refused a request by then if there is no place for it.
_REFUSAL_S = 0.05


class Waiting:
    """A request without an answer yet.

    refused: set when it is to give way. gone: set when it no longer waits.
    """

    def __init__(self, priority: int) -> None:
        self.priority = priority
        self.refused = asyncio.Event()
        self.gone = asyncio.Event()


class Shedding:
    """The requests of one ingress that may be refused for others: those of a priority above 0.

    As in vLLM a lower number is more important, and 0 is usual. A request for which another one
    gives way claims the place: less important ones are refused until it has it.
    """

    def __init__(self) -> None:
        # Those that have a place and may be refused, in the order of their arrival.
        self._placed: dict[Waiting, None] = {}
        self._claims: dict[Waiting, None] = {}

    async def begin(self, call: Callable[[], Any], priority: int) -> tuple[Any, Any]:
        """Call a replica; return the response and its first item, None at its end.

        Raises:
            Overloaded: this request gave way to a more important one.
            BackPressureError: the queue is full, and no less important request waits.
            Exception: the call failed.
        """
        if any(claim.priority < priority for claim in self._claims):
            raise Overloaded(None)
        waiting = Waiting(priority)
        try:
            try:
                return await self._call(call, waiting)
            except BackPressureError:
                if (shed := self._make_room(priority)) is None:
                    raise
            return await self._call_until_room(call, waiting, shed)
        finally:
            self._placed.pop(waiting, None)
            self._claims.pop(waiting, None)
            waiting.gone.set()

    async def _call_until_room(
        self, call: Callable[[], Any], waiting: Waiting, shed: Waiting
    ) -> tuple[Any, Any]:
        self._claims[waiting] = None
        await shed.gone.wait()
        shed_at_s = time.monotonic()
        until_s, pause_s = shed_at_s + _ROOM_S, _FIRST_PAUSE_S
        while True:
            await asyncio.sleep(pause_s)
            if waiting.refused.is_set():
                raise Overloaded(None)
            try:
                return await self._call(call, waiting)
            except BackPressureError:
                now_s = time.monotonic()
                if now_s > until_s:
                    raise
                if now_s - shed_at_s > _ANOTHER_S and self._make_room(waiting.priority) is not None:
                    shed_at_s = now_s
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _call(self, call: Callable[[], Any], waiting: Waiting) -> tuple[Any, Any]:
        response = call()
        try:
            if waiting.priority <= 0 and waiting not in self._claims:
                return response, await anext(response, None)
            return response, await self._first(response, waiting)
        except (asyncio.CancelledError, Overloaded):
            response.cancel()
            raise

    async def _first(self, response: Any, waiting: Waiting) -> Any:
        """Return a response's first item; raise Overloaded if its request gives way before."""
        first = asyncio.ensure_future(anext(response, None))
        refused = asyncio.ensure_future(waiting.refused.wait())
        both, either = (first, refused), asyncio.FIRST_COMPLETED
        try:
            done, _ = await asyncio.wait(both, timeout=_REFUSAL_S, return_when=either)
            if not done:
                # Serve refuses at once, so it has a place.
                self._claims.pop(waiting, None)
                if waiting.priority > 0:
                    self._placed[waiting] = None
                await asyncio.wait(both, return_when=either)
            if first.done():
                return first.result()
            raise Overloaded(None)
        finally:
            first.cancel()
            refused.cancel()
            # Serve raises an error of its own in a call that was cancelled.
            first.add_done_callback(lambda ended: ended.cancelled() or ended.exception())

    def _make_room(self, priority: int) -> Waiting | None:
        """Refuse the least important request that waits; among equals the one that came last.

        Returns:
            That one, or None if none of a priority above 0 is less important than `priority`.
        """
        candidates = [
            one
            for one in (*self._placed, *self._claims)
            if one.priority > max(0, priority) and not one.refused.is_set()
        ]
        if not candidates:
            return None
        least = max(reversed(candidates), key=lambda one: one.priority)
        self._placed.pop(least, None)
        least.refused.set()
        return least
