"""Values that Serve's controller knows, asked for now and then."""

import asyncio
import logging
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

_ASK_S = 5.0


class Watched(Generic[T]):
    """A value that is asked for now and then, while somebody wants to know it.

    latest: None before the first answer, and after a question without one.
    """

    def __init__(self, what: str, ask: Callable[[], T | None], pause_s: float = _ASK_S) -> None:
        """
        Args:
            what: the value, for the log.
            ask: waits for Serve's controller.
            pause_s: between two questions.
        """
        self._what = what
        self._ask = ask
        self._pause_s = pause_s
        self.latest: T | None = None

    async def run(self, is_wanted: Callable[[], bool] = lambda: True) -> None:
        """Ask until cancelled."""
        while True:
            if is_wanted():
                self.latest = await asyncio.to_thread(self._answer)
            await asyncio.sleep(self._pause_s)

    def _answer(self) -> T | None:
        try:
            return self._ask()
        except Exception as error:
            # The controller may be about to start again.
            logger.info("%s is unknown: %s", self._what, error)
            return None
