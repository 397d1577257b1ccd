"""Notices when Serve stops or resumes sending requests to a replica that still has some.

Serve has no hook for that. It informs every request router of a deployment's replicas, and a
replica that has a handle of its own deployment has such a router.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection


class Membership:
    """Passes changes of one replica from the threads of routers to an event loop.

    Serve takes a replica away from routers before it stops it, and while it reconfigures it.
    """

    def __init__(self, replica_id: str) -> None:
        """Remember the running event loop."""
        self._replica_id = replica_id
        self._loop = asyncio.get_running_loop()
        self._changes: asyncio.Queue[bool] = asyncio.Queue()
        # What was reported last, and what was followed last.
        self._is_there = self._was_there = True

    def update(self, before: Collection[str], after: Collection[str]) -> None:
        """Compare a router's replicas before and after an update. Safe in any thread."""
        is_there = self._replica_id in after
        if is_there != (self._replica_id in before):
            self._loop.call_soon_threadsafe(self._changes.put_nowait, is_there)

    async def follow(self, on_change: Callable[[bool], Awaitable[None]]) -> None:
        """Call `on_change` when routers lose or regain the replica, until cancelled.

        Several routers report the same change; it counts once.

        Raises:
            Exception: `on_change` has raised it. The next call of `follow` begins with that change,
                unless another one has revoked it.
        """
        while True:
            while not self._changes.empty():
                self._is_there = self._changes.get_nowait()
            if self._is_there is self._was_there:
                self._is_there = await self._changes.get()
                continue
            is_there = self._is_there
            await on_change(is_there)
            self._was_there = is_there
