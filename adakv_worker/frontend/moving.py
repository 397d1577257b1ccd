"""Stand-in for the engine core's client from which requests leave and to which they come.

The front end keeps what it has of a request (its stream, text, stop strings, log-probabilities,
usage) and gets its outputs from here, no matter which engine decodes them. A client sees no move.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs, EngineCoreRequest, FinishReason
from vllm.v1.engine.exceptions import EngineDeadError

from adakv_worker.frontend.continued import ContinuedCore
from adakv_worker.frontend.movable_requests import Departure, Movable, Own, continued
from adakv_worker.frontend.movement import DecodedAway, DecodedHere, Event, Exported, Place, Signal
from adakv_worker.frontend.sent_requests import BookedLLM
from adakv_worker.messages import Continuation, StateRefused

# One request's outputs of one step.
Decoded = list[EngineCoreOutput]

# An engine's own ends, not a request's. A client that leaves gets neither.
_LET_GO = (FinishReason.ABORT, FinishReason.ERROR)

T = TypeVar("T")


class MovingCore:
    """Stands in for vLLM's `EngineCoreClient` and forwards to it. For one event loop."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._own: dict[str, Own] = {}
        # By the engine core's name, without those that are away.
        self._here: dict[str, Own] = {}
        self._guests: dict[str, asyncio.Queue[Decoded | Exception]] = {}
        self._merged: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self._pump: asyncio.Task[None] | None = None
        # Set once the engine core has died or is shut down.
        self._over = asyncio.Event()
        self._numbers = itertools.count(1)
        # Awaited with each new request before the engine gets it.
        self.prepare: Callable[[EngineCoreRequest], Awaitable[None]] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        if self._pump is not None:
            self._pump.cancel()
        self._end_guests(ConnectionError("the engine is shut down"))
        self._core.shutdown(*args, **kwargs)

    @property
    def away(self) -> int:
        """Return how many requests of this front end another engine decodes."""
        return sum(own.state is Place.AWAY for own in self._own.values())

    @property
    def guests(self) -> int:
        """Return how many requests of other front ends this engine decodes."""
        return len(self._guests)

    def is_away(self, request_id: str) -> bool:
        """Return whether another engine decodes this request."""
        own = self._own.get(request_id)
        return own is not None and own.state is Place.AWAY

    # Calls of the front end.

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        if self.prepare is not None:
            # Routers must not take the engine for idle meanwhile.
            with self._core.preparing(request):
                await self.prepare(request)
        if request.sampling_params is not None:
            own = Own(request, request.request_id)
            self._own[request.request_id] = self._here[request.request_id] = own
        try:
            await self._core.add_request_async(request)
        except BaseException:
            # The engine may have it all the same; then the caller aborts it.
            self._own.pop(request.request_id, None)
            self._here.pop(request.request_id, None)
            raise

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        names = []
        for request_id in request_ids:
            own = self._own.get(request_id)
            if own is None:
                names.append(request_id)
                continue
            if own.state is not Place.AWAY:
                names.append(own.name)
            self._apply(own, Signal.CANCELLED)
        await self._core.abort_requests_async(names)

    async def get_output_async(self) -> EngineCoreOutputs:
        if self._pump is None:
            self._pump = asyncio.create_task(self._take_outputs())
        outputs = await self._merged.get()
        if isinstance(outputs, Exception):
            raise outputs
        return outputs

    # Calls of a replica that lends and borrows.

    async def cache_kind(self) -> str:
        """Return a name that engines share which can read each other's caches.

        Raises:
            ConnectionError: the engine core has ended.
        """
        kind: str = (await self.call_workers("adakv_cache_kind", ()))[0]
        return kind

    def movable(self) -> list[Movable]:
        """Return the compressed requests that are here and can move, the oldest first."""
        return [
            Movable(request_id, len(own.tokens), own.tokens_left, own.proof)
            for request_id, own in self._own.items()
            if own.proof is not None and own.can_leave
        ]

    async def leave(self, request_id: str, path: str) -> Departure | None:
        """Take a request out of the engine and write its cache to the files at `path`.

        Returns None, and leaves the request in the engine, if it has ended or is not `movable`.
        After it has left, its outputs are those that `deliver` gets, until `come_back`.

        Raises:
            ConnectionError: the engine core has ended.
            Exception: a worker failed, as when it cannot write the cache. `is_away` returns
                whether the request had already left.
        """
        own = self._own.get(request_id)
        if own is None or own.proof is None or not own.can_leave:
            return None
        self._apply(own, Signal.ASKED_TO_LEAVE)
        try:
            tokens = await self._export(own, path, own.proof.policy)
            if tokens is not None:
                await self._catch_up(own, tokens)
        except BaseException:
            self._apply(own, Signal.STAYED)
            raise
        # The last step may have ended it, or its client may have left meanwhile.
        if tokens is None or own.state is Place.ENDED:
            self._apply(own, Signal.STAYED)
            return None
        self._apply(own, Signal.LEFT)
        del self._here[own.name]
        await self._core.abort_requests_async([own.name])
        return Departure(own.request, tokens, own.proof)

    def deliver(self, request_id: str, outputs: Iterable[EngineCoreOutput]) -> bool:
        """Hand on another engine's outputs of a request that is away.

        Returns whether the request goes on: it is not complete and its client has not left.
        """
        own = self._own.get(request_id)
        if own is None or own.state is not Place.AWAY:
            return False
        self._apply(own, DecodedAway(tuple(outputs)))
        return own.state is Place.AWAY

    def on_end(self, request_id: str, call: Callable[[], None]) -> None:
        """Call `call` once the request is complete or its client has left."""
        if own := self._own.get(request_id):
            own.on_end = call

    async def come_back(self, request_id: str) -> None:
        """Compute a request that is away anew in this engine: prompt, answer so far, and on.

        If it cannot be added, its client gets an error and the exception is raised.
        """
        own = self._own.get(request_id)
        if own is None or own.state is not Place.AWAY:
            return
        self._apply(own, Signal.CAME_BACK)
        own.proof = None
        own.name = f"{request_id}-{next(self._numbers)}"
        self._here[own.name] = own
        continuation = Continuation(len(own.request.prompt_token_ids or ()))
        request = continued(own.request, own.name, own.tokens, continuation)
        try:
            await self._core.add_request_async(request)
        except BaseException:
            failed = EngineCoreOutput(own.name, [], finish_reason=FinishReason.ERROR)
            self._apply(own, DecodedHere((failed,)))
            # The engine may have it all the same.
            with contextlib.suppress(Exception):
                await self._core.abort_requests_async([request.request_id])
            raise

    # Calls of a replica that has room.

    async def take_in(self, departure: Departure, path: str) -> AsyncGenerator[Decoded, None]:
        """Go on with another front end's request from its cache in the files at `path`.

        Yields its outputs until its end. Closing the generator ends the request.

        Raises:
            StateRefused: the cache is damaged or not the request's.
            ConnectionError: the engine ends the request, as when it shuts down.
        """
        name = f"{departure.request.request_id}-guest-{next(self._numbers)}"
        arguments = (name, path, departure.proof.policy, departure.tokens)
        try:
            problems = await self.call_workers("adakv_stage", arguments)
            if any(problems):
                raise StateRefused(next(filter(None, problems)))
            queue = self._guests[name] = asyncio.Queue()
            if self._over.is_set():
                raise ConnectionError("the engine core has ended")
            prompt = len(departure.request.prompt_token_ids or ())
            continuation = Continuation(prompt, name, departure.proof)
            request = continued(departure.request, name, departure.tokens, continuation)
            await self._core.add_request_async(request)
            finished = False
            while not finished:
                outputs = await queue.get()
                if isinstance(outputs, Exception):
                    raise outputs
                if any(output.finish_reason in _LET_GO for output in outputs):
                    raise ConnectionError("the engine has ended the request")
                finished = any(output.finished for output in outputs)
                yield outputs
        finally:
            if self._guests.pop(name, None) is not None:
                await self._core.abort_requests_async([name])
            with contextlib.suppress(Exception):
                await self.call_workers("adakv_unstage", (name,))

    async def bring(self, carrier: EngineCoreRequest) -> None:
        """Send the scheduler a request that carries something, and has no outputs."""
        await self._core.add_request_async(carrier)
        # It is over as soon as it is there.
        await self._core.abort_requests_async([carrier.request_id])

    # The way of outputs.

    async def _take_outputs(self) -> None:
        try:
            while True:
                outputs = await self._core.get_output_async()
                outputs.outputs = [
                    mine for output in outputs.outputs for mine in self._sort(output)
                ]
                self._merged.put_nowait(outputs)
        # A library can raise the latter, and then the front end would wait for ever.
        except (Exception, asyncio.CancelledError) as error:
            if not isinstance(error, Exception):
                error = ConnectionError("the engine core's outputs have ended")
            # After the shutdown no task awaits outputs.
            if not self._over.is_set():
                self._end_guests(error)
                self._merged.put_nowait(error)

    def _sort(self, output: EngineCoreOutput) -> list[EngineCoreOutput]:
        """Pass on a guest's output, and return what the front end gets."""
        if queue := self._guests.get(output.request_id):
            queue.put_nowait([output])
            return []
        if own := self._here.get(output.request_id):
            return self._change(own, DecodedHere((output,)))
        # The engine decodes a request that has left until it gets the abort.
        return [] if output.request_id in self._own else [output]

    def _apply(self, own: Own, event: Event) -> None:
        if outputs := self._change(own, event):
            self._merged.put_nowait(EngineCoreOutputs(outputs=outputs))

    def _change(self, own: Own, event: Event) -> list[EngineCoreOutput]:
        outputs = own.apply(event)
        if own.state is Place.ENDED and self._own.pop(own.request.request_id, None) is not None:
            self._here.pop(own.name, None)
            if own.on_end is not None:
                own.on_end()
        return outputs

    def _end_guests(self, error: Exception) -> None:
        self._over.set()
        for queue in self._guests.values():
            queue.put_nowait(error)

    async def _export(self, own: Own, path: str, policy: str) -> list[int] | None:
        ranks = await self.call_workers("adakv_export", (own.name, path, policy))
        return ranks[0] if all(tokens == ranks[0] for tokens in ranks) else None

    async def _catch_up(self, own: Own, tokens: list[int]) -> None:
        """Wait until the stream of a leaving request has the tokens of its cache."""
        self._apply(own, Exported(len(tokens) - len(own.tokens)))
        await self._while_core_lives(own.settled.wait())
        if own.state is not Place.ENDED and own.tokens != tokens:
            raise RuntimeError("the cache and the stream have different tokens")

    async def call_workers(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        """Call a method of all workers between two steps, and return the answer of each.

        Raises:
            ConnectionError: the engine core has ended.
        """
        # vLLM never answers a call whose engine core dies.
        call: Coroutine[Any, Any, list[Any]] = self._core.collective_rpc_async(
            method, None, arguments
        )
        return await self._while_core_lives(call)

    async def _while_core_lives(self, waited: Coroutine[Any, Any, T]) -> T:
        """Wait for something that only a living engine core completes.

        Raises:
            ConnectionError: the engine core has ended.
        """
        task, over = asyncio.ensure_future(waited), asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait((task, over), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ConnectionError("the engine core has ended")
            return task.result()
        except EngineDeadError as error:
            # The engine core ended before the call came.
            raise ConnectionError("the engine core has ended") from error
        finally:
            task.cancel()
            over.cancel()


class MovableLLM(BookedLLM):
    """An `AsyncLLM` whose requests can move."""

    def _stand_in(self, core: ContinuedCore) -> MovingCore:
        return MovingCore(core)
