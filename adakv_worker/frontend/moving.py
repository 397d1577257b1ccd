"""Between vLLM's front end and its engine core: requests leave, go on elsewhere, and are taken in.

The front end keeps what it knows of a request (its stream, text, stop strings, log-probabilities,
usage) and gets its outputs from here, wherever they come from. So a client notices nothing.
"""

import asyncio
import contextlib
import itertools
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from typing import Any

import msgspec
from vllm.v1.engine import (
    EngineCoreEventType,
    EngineCoreOutput,
    EngineCoreOutputs,
    EngineCoreRequest,
    FinishReason,
)

from adakv_worker.frontend.movable_requests import Departure, Movable, Own, continued
from adakv_worker.frontend.sent_requests import BookedCore, BookedLLM
from adakv_worker.messages import Continuation, StateRefused, proof_in

# What an engine has decoded of one request in a step.
Decoded = list[EngineCoreOutput]

# An engine's own ends, which are not a request's: a client that leaves never hears of one.
_LET_GO = (FinishReason.ABORT, FinishReason.ERROR)


class MovingCore:
    """Stands in for vLLM's `EngineCoreClient`, which it asks for everything. One event loop's."""

    def __init__(self, core: Any) -> None:
        self._core = core
        self._own: dict[str, Own] = {}
        # By the engine core's name for them; those that are somewhere else are not among them.
        self._here: dict[str, Own] = {}
        self._guests: dict[str, asyncio.Queue[Decoded | Exception]] = {}
        self._merged: asyncio.Queue[EngineCoreOutputs | Exception] = asyncio.Queue()
        self._pump: asyncio.Task[None] | None = None
        # Set once the engine core gives no outputs any more: it has died, or is shut down.
        self._over = asyncio.Event()
        self._numbers = itertools.count(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def shutdown(self, *args: Any, **kwargs: Any) -> None:
        if self._pump is not None:
            self._pump.cancel()
        self._end_guests(ConnectionError("the engine is shut down"))
        self._core.shutdown(*args, **kwargs)

    @property
    def away(self) -> int:
        """Requests of this front end that are decoded somewhere else."""
        return sum(own.away for own in self._own.values())

    @property
    def guests(self) -> int:
        """Requests of other front ends that are decoded here."""
        return len(self._guests)

    def is_away(self, request_id: str) -> bool:
        own = self._own.get(request_id)
        return own is not None and own.away

    # What the front end calls.

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        if request.sampling_params is not None:
            own = Own(request, request.request_id)
            self._own[request.request_id] = self._here[request.request_id] = own
        try:
            await self._core.add_request_async(request)
        except BaseException:
            # It may have been sent all the same; whoever adds it then aborts it.
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
            if not own.away:
                names.append(own.name)
            self._end(own)
        await self._core.abort_requests_async(names)

    async def get_output_async(self) -> EngineCoreOutputs:
        if self._pump is None:
            self._pump = asyncio.create_task(self._take_outputs())
        outputs = await self._merged.get()
        if isinstance(outputs, Exception):
            raise outputs
        return outputs

    # What a replica does that has too little room.

    def movable(self) -> list[Movable]:
        """Compressed requests that are here and whose state can move, the oldest first."""
        return [
            Movable(
                request_id,
                len(own.tokens),
                own.tokens_left,
                own.proof,
            )
            for request_id, own in self._own.items()
            if own.proof is not None and own.can_leave
        ]

    async def leave(self, request_id: str, path: str) -> Departure | None:
        """Takes a request out of the engine; its cache is in the files at `path` then.

        Returns None, and leaves it where it is, where it has ended or is not `movable`. From now
        on its outputs are those that `deliver` gets, until `come_back`.

        Whatever it raises (vLLM raises plain exceptions of what a worker does, and it is a
        ConnectionError where the engine core ends meanwhile), `is_away` tells where the request
        is: here, if its cache could not be written.
        """
        own = self._own.get(request_id)
        if own is None or own.proof is None or not own.can_leave:
            return None
        own.held, own.wanted, own.settled = [], None, asyncio.Event()
        try:
            tokens = await self._export(own, path, own.proof.policy)
            if tokens is not None:
                own.wanted = len(tokens) - len(own.request.prompt_token_ids or ())
                self._hand_on(self._counting(own))
                await self._while_core_lives(own.settled.wait())
                if not own.finished and own.tokens != tokens:
                    raise RuntimeError("the cache is of other tokens than the stream")
        except BaseException:
            self._stay(own)
            raise
        # The step before may have ended it, and its client may have left meanwhile.
        if tokens is None or own.finished:
            self._stay(own)
            return None
        own.away, own.held = True, None
        del self._here[own.name]
        await self._core.abort_requests_async([own.name])
        return Departure(own.request, tokens, own.proof)

    def deliver(self, request_id: str, outputs: Iterable[EngineCoreOutput]) -> bool:
        """Hands on what another engine has decoded of a request that is away.

        Returns whether more is wanted: neither is it at its end nor has its client left.
        """
        own = self._own.get(request_id)
        if own is None or not own.away:
            return False
        self._hand_on([self._note(own, output) for output in outputs])
        return not own.finished

    def on_end(self, request_id: str, call: Callable[[], None]) -> None:
        """Has `call` called once a request has ended or its client has left."""
        if own := self._own.get(request_id):
            own.on_end = call

    async def come_back(self, request_id: str) -> None:
        """Compute a request that is away anew, here: prompt and answer so far, and on.

        Where it cannot be added, its client gets an error, and the exception is raised.
        """
        own = self._own.get(request_id)
        if own is None or not own.away:
            return
        own.away, own.proof = False, None
        own.name = f"{request_id}-{next(self._numbers)}"
        self._here[own.name] = own
        continuation = Continuation(len(own.request.prompt_token_ids or ()))
        request = continued(own.request, own.name, own.tokens, continuation)
        try:
            await self._core.add_request_async(request)
        except BaseException:
            if not own.finished:
                failed = EngineCoreOutput(own.name, [], finish_reason=FinishReason.ERROR)
                self._hand_on([self._note(own, failed)])
            # It may have been sent all the same.
            with contextlib.suppress(Exception):
                await self._core.abort_requests_async([request.request_id])
            raise

    # What a replica does that has room.

    async def take_in(self, departure: Departure, path: str) -> AsyncGenerator[Decoded, None]:
        """Goes on with another front end's request from its cache in the files at `path`.

        Yields its outputs until its end. Closing it ends the request.

        Raises:
            StateRefused: the cache is not what the request needs, or damaged.
            ConnectionError: the engine ends it, as when it shuts down.
        """
        name = f"{departure.request.request_id}-guest-{next(self._numbers)}"
        arguments = (name, path, departure.policy, departure.tokens)
        try:
            problems = await self._rpc("adakv_stage", arguments)
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
                    raise ConnectionError("the engine has let go of it")
                finished = any(output.finished for output in outputs)
                yield outputs
        finally:
            if self._guests.pop(name, None) is not None:
                await self._core.abort_requests_async([name])
            with contextlib.suppress(Exception):
                await self._rpc("adakv_unstage", (name,))

    # Outputs on their way.

    async def _take_outputs(self) -> None:
        try:
            while True:
                outputs = await self._core.get_output_async()
                outputs.outputs = self._of_this_front_end(outputs.outputs)
                self._merged.put_nowait(outputs)
        except Exception as error:
            self._end_guests(error)
            self._merged.put_nowait(error)

    def _end_guests(self, error: Exception) -> None:
        self._over.set()
        for queue in self._guests.values():
            queue.put_nowait(error)

    async def _rpc(self, method: str, arguments: tuple[Any, ...]) -> list[Any]:
        # vLLM leaves a call for ever without an answer when its engine core dies.
        call = self._core.collective_rpc_async(method, None, arguments)
        ranks: list[Any] = await self._while_core_lives(call)
        return ranks

    async def _while_core_lives(self, waited: Coroutine[Any, Any, Any]) -> Any:
        """Wait for what only a living engine core brings about.

        Raises:
            ConnectionError: it has ended.
        """
        tasks = [asyncio.ensure_future(waited), asyncio.ensure_future(self._over.wait())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not tasks[0].done():
                raise ConnectionError("the engine core has ended")
            return tasks[0].result()
        finally:
            for task in tasks:
                task.cancel()

    def _of_this_front_end(self, outputs: list[EngineCoreOutput]) -> list[EngineCoreOutput]:
        mine = []
        for output in outputs:
            if queue := self._guests.get(output.request_id):
                queue.put_nowait([output])
            elif own := self._here.get(output.request_id):
                if own.held is None:
                    mine.append(self._note(own, output))
                else:
                    own.held.append(output)
                    mine += self._counting(own)
            elif output.request_id not in self._own:
                mine.append(output)
            # Else the engine had decoded it before it knew that the request had left.
        return mine

    def _counting(self, own: Own) -> list[EngineCoreOutput]:
        """Takes what counts from a leaving request's held outputs."""
        counting = []
        while own.held and own.wanted is not None and len(own.answer) < own.wanted:
            counting.append(self._note(own, own.held.pop(0)))
        if own.wanted is not None and len(own.answer) >= own.wanted:
            own.settled.set()
        return counting

    def _stay(self, own: Own) -> None:
        """A request that was asked to leave does not."""
        held, own.held = own.held or [], None
        if not own.finished:
            self._hand_on([self._note(own, output) for output in held])

    def _hand_on(self, outputs: list[EngineCoreOutput]) -> None:
        if outputs:
            self._merged.put_nowait(EngineCoreOutputs(outputs=outputs))

    async def _export(self, own: Own, path: str, policy: str) -> list[int] | None:
        ranks = await self._rpc("adakv_export", (own.name, path, policy))
        return ranks[0] if all(tokens == ranks[0] for tokens in ranks) else None

    def _note(self, own: Own, output: EngineCoreOutput) -> EngineCoreOutput:
        own.answer += output.new_token_ids
        if (proof := proof_in(output.kv_transfer_params)) is not None:
            own.proof = proof if proof.compressed else None
        if output.finished:
            self._end(own)
        if output.request_id == own.request.request_id:
            return output
        # It has been queued and scheduled before, as far as the front end's statistics go.
        events = [e for e in output.events or () if e.type is EngineCoreEventType.PREEMPTED]
        return msgspec.structs.replace(
            output, request_id=own.request.request_id, events=events or None
        )

    def _end(self, own: Own) -> None:
        own.finished = True
        own.settled.set()
        self._own.pop(own.request.request_id, None)
        self._here.pop(own.name, None)
        if own.on_end is not None:
            own.on_end()


class MovableLLM(BookedLLM):
    """An `AsyncLLM` whose requests can move."""

    def _stand_in(self, core: BookedCore) -> MovingCore:
        return MovingCore(core)
