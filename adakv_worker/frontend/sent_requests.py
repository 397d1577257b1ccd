"""Requests that a front end has sent to its engine core, and an `AsyncLLM` that books them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutputs, EngineCoreRequest
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.input_processor import InputProcessor

from adakv_worker.config import compression_config
from adakv_worker.frontend.answer_tokens import current_answer_tokens
from adakv_worker.frontend.continued import ContinuedCore
from adakv_worker.frontend.sampling_limits import check_for
from adakv_worker.frontend.tenants import with_tenant
from adakv_worker.messages import continuation_in


class SentRequests:
    """Live requests of an engine core, by the engine core's names, oldest first.

    The scheduler's statistics cover the requests that it had received by then. A step with a long
    prefill takes seconds; requests sent meanwhile are `unseen`, and so are those that are about to
    be sent.
    """

    def __init__(self) -> None:
        # Prompt tokens to compute, by request.
        self._live: dict[str, int] = {}
        self._unanswered: set[str] = set()
        # Requests sent after the last one that statistics covered. Ended ones stay for the order.
        self._unseen: dict[str, None] = {}
        self._preparing: dict[str, int] = {}

    @contextlib.contextmanager
    def preparing(self, request_id: str, prefill_tokens: int) -> Iterator[None]:
        """Count a request as about to be sent, inside the context."""
        self._preparing[request_id] = prefill_tokens
        try:
            yield
        finally:
            del self._preparing[request_id]

    def send(self, request_id: str, prefill_tokens: int) -> None:
        """Add a request, before it is sent."""
        self._live[request_id] = prefill_tokens
        self._unanswered.add(request_id)
        self._unseen[request_id] = None

    def answer(self, request_id: str) -> None:
        """Note that a request has an output, so that its prefill is over."""
        self._unanswered.discard(request_id)

    def end(self, request_id: str) -> None:
        """Remove a request that has ended or could not be sent."""
        self._live.pop(request_id, None)
        self._unanswered.discard(request_id)
        self._drop_ended()

    def receive(self, last_received: str | None) -> None:
        """Note that new statistics cover all requests up to this one."""
        if last_received in self._unseen:
            order = list(self._unseen)
            self._unseen = dict.fromkeys(order[order.index(last_received) + 1 :])
            self._drop_ended()

    def unseen(self) -> list[str]:
        """Return the requests that statistics do not cover yet."""
        sent = [request_id for request_id in self._unseen if request_id in self._live]
        return [*sent, *self._preparing]

    def newest_but(self, count: int) -> list[str]:
        """Return all requests but the `count` oldest."""
        return [*list(self._live)[count:], *self._preparing]

    def prefill_tokens(self, request_ids: Iterable[str]) -> list[int]:
        """Return the prompt tokens of these requests."""
        tokens = {**self._preparing, **self._live}
        return [tokens[request_id] for request_id in request_ids]

    def unanswered(self, *, but: Iterable[str] = ()) -> list[str]:
        """Return the live requests without an output, except those of `but`."""
        left = self._unanswered.difference(but)
        return [request_id for request_id in self._live if request_id in left]

    def _drop_ended(self) -> None:
        while self._unseen and (oldest := next(iter(self._unseen))) not in self._live:
            del self._unseen[oldest]


class BookedCore:
    """Stands in for vLLM's `EngineCoreClient` and books the requests sent through it."""

    def __init__(
        self, core: Any, sent: SentRequests, check: Callable[[SamplingParams], None]
    ) -> None:
        """
        Args:
            check: raises ValueError for parameters that the engine's workers cannot run.
        """
        self._core = core
        self._sent = sent
        self._check = check

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def preparing(self, request: EngineCoreRequest) -> AbstractContextManager[None]:
        """Return a context in which a request is booked that is about to be sent."""
        return self._sent.preparing(request.request_id, _prefill_tokens(request))

    async def add_request_async(self, request: EngineCoreRequest) -> None:
        if request.sampling_params is not None:
            self._check(request.sampling_params)
        # The first output may come before the call below returns.
        self._sent.send(request.request_id, _prefill_tokens(request))
        try:
            await self._core.add_request_async(request)
        except BaseException:
            self._sent.end(request.request_id)
            raise

    async def abort_requests_async(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            self._sent.end(request_id)
        await self._core.abort_requests_async(request_ids)

    async def get_output_async(self) -> EngineCoreOutputs:
        outputs: EngineCoreOutputs = await self._core.get_output_async()
        for output in outputs.outputs:
            if output.finished:
                self._sent.end(output.request_id)
            else:
                self._sent.answer(output.request_id)
        return outputs


class BookedLLM(AsyncLLM):
    """vLLM's `AsyncLLM` with a book of sent requests. One that cannot be added leaves no trace."""

    engine_core: Any
    _sent: SentRequests | None = None
    _continued: ContinuedCore

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # vLLM calls it once for each request, before it copies the request for each choice (`n`).
        # It sends these copies past `_add_request`, and has no other hook before them.
        self.input_processor.assign_request_id = _begin  # type: ignore[method-assign]

    @property
    def sent(self) -> SentRequests:
        """The live requests of its engine core."""
        assert self._sent is not None, "made inside an event loop"
        return self._sent

    def _stand_in(self, core: ContinuedCore) -> Any:
        """Return the client that the front end uses."""
        return core

    def _run_output_handler(self) -> None:
        # vLLM calls this first after it has made the client.
        if self._sent is None:
            self._sent = SentRequests()
            check = check_for(self.vllm_config)
            compressing = compression_config(self.vllm_config.additional_config) is not None
            core = BookedCore(self.engine_core, self._sent, check)
            self._continued = ContinuedCore(core, compressing=compressing)
            self.engine_core = self._stand_in(self._continued)
        super()._run_output_handler()

    async def _add_request(self, request: EngineCoreRequest, *args: Any, **kwargs: Any) -> None:
        self._follow(request)
        try:
            await super()._add_request(request, *args, **kwargs)
        except BaseException:
            # vLLM's output processor has it but would not abort it, and the engine may have it
            # too, as when the client left while the request was sent.
            with contextlib.suppress(Exception):
                await self.abort(request.request_id, internal=True)
            raise

    def _follow(self, request: EngineCoreRequest) -> None:
        """Note who follows a request's tokens, and with which ones it begins."""
        answer = current_answer_tokens.get()
        if answer is None:
            return
        if answer.begun_with:
            self._continued.begin_with(request, answer.begun_with)
        if self._continued.can_go_on(request):
            states = self.output_processor.request_states
            answer.follow(_DecodedTokens(states, request.request_id))


def _begin(request: EngineCoreRequest) -> None:
    InputProcessor.assign_request_id(request)
    with_tenant(request)


class _DecodedTokens:
    """Reads the tokens of a request from which an engine could go on."""

    def __init__(self, states: Mapping[str, Any], request_id: str) -> None:
        """
        Args:
            states: vLLM's, by request. A request that has ended has none.
        """
        self._states = states
        self._request_id = request_id
        self._state: Any = None

    def __call__(self) -> Sequence[int]:
        state = self._states.get(self._request_id)
        self._state = state or self._state
        if self._state is None:
            return []
        tokens: list[int] = self._state.detokenizer.output_token_ids
        # Nothing follows the last token of an answer; an engine may decode that once more.
        return tokens if state is not None else tokens[:-1]


def _prefill_tokens(request: EngineCoreRequest) -> int:
    continuation = continuation_in(request.sampling_params)
    if continuation is not None and continuation.state is not None:
        # Its cache comes with it.
        return 0
    if request.prompt_token_ids is not None:
        return len(request.prompt_token_ids)
    return len(request.prompt_embeds) if request.prompt_embeds is not None else 0
