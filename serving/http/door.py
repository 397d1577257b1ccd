"""What all requests of one front door share: keys, limits, the backend and its health."""

import asyncio
import logging
import math
import time
from collections.abc import Callable

from adakv_serve.serving.http.api_keys import ApiKeys
from adakv_serve.serving.http.backend import Backend
from adakv_serve.serving.http.bodies import Bodies
from adakv_serve.serving.http.door_settings import FrontDoorSettings
from adakv_serve.serving.http.draining import Draining
from adakv_serve.serving.http.failures import BackendFailure
from adakv_serve.serving.http.key_file import KeyFile
from adakv_serve.serving.http.key_limits import KeyLimits
from adakv_serve.serving.http.paths import Paths
from adakv_serve.serving.http.retries import Retries

# An answer this recent proves that a replica works, even if a ping would wait in a long queue.
_RECENT_ANSWER_S = 5.0


class Door:
    """The state of a front door. Only its own methods change it."""

    def __init__(
        self,
        backend: Backend,
        settings: FrontDoorSettings,
        logger: logging.Logger,
        clock: Callable[[], float] = time.monotonic,
        doors: Callable[[], int] = lambda: 1,
    ) -> None:
        """
        Args:
            doors: returns the number of front doors, which share the limits of keys.
        """
        self.backend = backend
        self.settings = settings
        self.logger = logger
        file = None if settings.keys_file is None else KeyFile(settings.keys_file, logger)
        self.keys = ApiKeys(settings.api_keys, file, settings.key_digests)
        self.paths = Paths(settings.more_paths)
        by_name = dict(settings.limits_by_key)
        self.limits = KeyLimits(settings.limits, by_name, doors, clock, settings.places)
        self.bodies = Bodies(
            settings.max_body_bytes, settings.max_held_body_bytes, settings.body_timeout_s
        )
        self.draining = Draining(clock)
        self.retries = Retries(clock)
        self._clock = clock
        self._last_answer_at = -math.inf
        self._asking: asyncio.Task[bool] | None = None

    def note_answer(self) -> None:
        """Record that a replica has just answered."""
        self._last_answer_at = self._clock()

    async def healthy(self) -> bool:
        """Return whether some replica answers, or has answered a moment ago."""
        if self._clock() - self._last_answer_at < _RECENT_ANSWER_S:
            return True
        # A ping takes a place among the requests that wait: all who ask share one.
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(self._answers())
        return await asyncio.shield(self._asking)

    async def _answers(self) -> bool:
        try:
            await asyncio.wait_for(self.backend.ping(), self.settings.health_timeout_s)
        except (BackendFailure, TimeoutError):
            return False
        return True
