"""One move of a request to a lender, from its departure to its end or its return."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from adakv_serve.router.lending.leases import Lease
from adakv_serve.router.lending.spill_plan import SpillLimits
from adakv_serve.serving.spill.parcels import Guest, StateFiles

if TYPE_CHECKING:
    from adakv_worker.frontend.moving import Decoded, MovingCore

Send = Callable[[Guest], "AsyncGenerator[Decoded, None]"]


class SpillSettings(NamedTuple):
    """
    expected_tokens: most tokens that an answer is expected to add.
    first_output_s: longest wait for a lender's first output, or for the arrival of a parked cache.
    parked_s: longest wait of a parked cache for a lender's blocks.
    bytes_per_s: assumed speed of a move to a lender without a measured one.
    """

    limits: SpillLimits
    interval_s: float
    expected_tokens: int
    prefill_tokens_per_s: float
    first_output_s: float
    parked_s: float
    bytes_per_s: float
    folder: Path


class MoveReport(NamedTuple):
    """A move up to its first output, or to its failure.

    export_s, arrival_s, seconds: time from the decision until the cache was exported, had arrived,
    and until the first output.
    problem: why the request does not go on at the lender, or None.
    """

    request_id: str
    lender: str
    state_bytes: int
    export_s: float
    arrival_s: float
    seconds: float
    problem: str | None

    @property
    def bytes_per_s(self) -> float:
        """Return the speed between the engines, without the waits for the ends of their steps."""
        return self.state_bytes / max(self.arrival_s - self.export_s, 1e-3)

    def log_line(self) -> dict[str, str | int | float]:
        return {
            "request_id": self.request_id,
            "lender": self.lender,
            "bytes": self.state_bytes,
            "export_ms": round(self.export_s * 1000, 2),
            "arrival_ms": round(self.arrival_s * 1000, 2),
            "first_output_ms": round(self.seconds * 1000, 2),
        }


class Stayed(Exception):
    """The request has not left, or has ended meanwhile."""


class RequestMove:
    """One request on its way to a lender."""

    def __init__(
        self,
        request_id: str,
        lease: Lease,
        *,
        core: "MovingCore",
        send: Send,
        files: StateFiles,
        settings: SpillSettings,
        on_end: Callable[[], object],
    ) -> None:
        """
        Args:
            send: sends a request to its lender, and yields its outputs.
            on_end: called when the request ends in any way while or after it moves.
        """
        self.request_id = request_id
        self.lease = lease
        self._core = core
        self._send = send
        self._files = files
        self._settings = settings
        self._on_end = on_end
        self._began = time.monotonic()
        self._export_s = self._arrival_s = 0.0
        self._state_bytes = 0
        # The request's trace headers. They are known once it has left.
        self.trace: Mapping[str, str] | None = None

    async def run(
        self,
        on_left: Callable[[], None],
        on_arrived: Callable[[MoveReport], Coroutine[None, None, None]],
    ) -> None:
        """Move the request and hand on its outputs until its end.

        After an exception, `MovingCore.is_away` is True if the request has to come back.

        Args:
            on_left: called once the request has left its engine.
            on_arrived: awaited after the lender's first output, before it is handed on.

        Raises:
            Stayed: the request has ended, or it has no cache now.
            TimeoutError: the lender has not answered in time.
            ConnectionError: the lender has ended the request.
        """
        async with contextlib.AsyncExitStack() as stack:
            files = stack.enter_context(contextlib.ExitStack())
            path = files.enter_context(self._files.path())
            guest = await self._leave(path)
            self._check_away()
            on_left()
            self._export_s, self._state_bytes = self._elapsed_s(), guest.nbytes
            outputs = await stack.enter_async_context(contextlib.aclosing(self._send(guest)))
            # A guest has all tokens of its request, and this frame lasts as long as the request.
            del guest
            first = await self._first_output(outputs)
            self._check_away()
            # The cache is in the lender's engine now.
            files.close()
            await on_arrived(self.report())
            await self._follow(first, outputs)

    def report(self, problem: str | None = None) -> MoveReport:
        """Return the figures so far."""
        return MoveReport(
            self.request_id,
            self.lease.lender,
            self._state_bytes,
            self._export_s,
            self._arrival_s,
            self._elapsed_s(),
            problem,
        )

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._began

    async def _leave(self, path: Path) -> Guest:
        departure = await self._core.leave(self.request_id, str(path))
        if departure is None:
            raise Stayed
        task = asyncio.current_task()
        assert task is not None
        self.trace = departure.request.trace_headers
        self._core.on_end(self.request_id, lambda: self._ended(task))
        return Guest(departure, str(path), self.lease)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._on_end()
        # The task itself may have delivered the last output: then it ends by itself.
        if task is not asyncio.current_task():
            task.cancel()

    def _check_away(self) -> None:
        """Raise Stayed if the request has ended before its `on_end` was set, or meanwhile."""
        if not self._core.is_away(self.request_id):
            raise Stayed

    async def _first_output(self, outputs: "AsyncGenerator[Decoded, None]") -> "Decoded":
        settings = self._settings
        async with asyncio.timeout(settings.first_output_s) as patience:
            # The first batch is empty and only says that the cache has arrived.
            await anext(outputs)
            self._arrival_s = self._elapsed_s()
            if self.lease.resource == "host_bytes":
                patience.reschedule(asyncio.get_running_loop().time() + settings.parked_s)
            return await anext(outputs)

    async def _follow(self, first: "Decoded", outputs: "AsyncGenerator[Decoded, None]") -> None:
        """Hand on the lender's outputs until the request's end."""
        batch = first
        while self._core.deliver(self.request_id, batch):
            batch = await anext(outputs, [])
            if not batch:
                raise ConnectionError("the lender has ended the request")
