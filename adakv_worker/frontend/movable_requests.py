"""Requests of a front end that can move, and their form on the way to another engine."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreEventType, EngineCoreOutput, EngineCoreRequest

from adakv_worker.frontend.movement import Event, Leaving, Place, State, transition
from adakv_worker.messages import Continuation, Proof, proof_in


class Departure(NamedTuple):
    """A request that has left its engine, on its way to another. Plain data, to be pickled.

    request: the request as its client sent it.
    tokens: prompt and answer so far; the cache holds all but the last.
    proof: its proof of compression.
    """

    request: EngineCoreRequest
    tokens: list[int]
    proof: Proof


class Movable(NamedTuple):
    """A compressed request that could leave now.

    tokens: number of tokens of prompt and answer. tokens_left: the most that the answer may add.
    """

    request_id: str
    tokens: int
    tokens_left: int
    proof: Proof


@dataclass
class Own:
    """A request of this front end.

    name: the engine core's name of it, a new one each time that it comes back.
    settled: set unless it is leaving and its stream lacks tokens of its cache.
    """

    request: EngineCoreRequest
    name: str
    state: State = Place.HERE
    answer: list[int] = field(default_factory=list)
    proof: Proof | None = None
    settled: asyncio.Event = field(default_factory=asyncio.Event)
    on_end: Callable[[], None] | None = None

    @property
    def tokens(self) -> list[int]:
        return [*(self.request.prompt_token_ids or ()), *self.answer]

    @property
    def tokens_left(self) -> int:
        params = self.request.sampling_params
        most = params.max_tokens if params is not None else None
        return (most or 0) - len(self.answer)

    @property
    def can_leave(self) -> bool:
        # Engines number their adapters by themselves.
        is_here = self.state is Place.HERE and self.request.lora_request is None
        return is_here and is_all_tokens(self.request)

    def apply(self, event: Event) -> list[EngineCoreOutput]:
        """Change the state, and return the outputs that the front end gets."""
        self.state, outputs = transition(self.state, event)
        if isinstance(self.state, Leaving) and not self.state.has_caught_up:
            self.settled.clear()
        else:
            self.settled.set()
        return [self._note(output) for output in outputs]

    def _note(self, output: EngineCoreOutput) -> EngineCoreOutput:
        self.answer += output.new_token_ids
        if (proof := proof_in(output.kv_transfer_params)) is not None:
            self.proof = proof if proof.compressed else None
        if output.request_id == self.request.request_id:
            return output
        # The front end's statistics have counted it as queued and scheduled before.
        events = [e for e in output.events or () if e.type is EngineCoreEventType.PREEMPTED]
        return msgspec.structs.replace(
            output, request_id=self.request.request_id, events=events or None
        )


def is_all_tokens(request: EngineCoreRequest) -> bool:
    """Return whether a request's tokens, cache and random numbers are all of its state."""
    params = request.sampling_params
    return (
        params is not None
        and params.structured_outputs is None
        and params.prompt_logprobs is None
        # vLLM counts it over the prompt, which would include the answer so far.
        and params.thinking_token_budget is None
        and request.prompt_token_ids is not None
        and request.prompt_embeds is None
        and not request.mm_features
        and not request.resumable
    )


def continued(
    request: EngineCoreRequest, name: str, tokens: list[int], continuation: Continuation
) -> EngineCoreRequest:
    """Return the request under a new name, with all of its tokens so far as its prompt."""
    assert request.sampling_params is not None
    params: SamplingParams = request.sampling_params.clone()
    params.extra_args = {**(params.extra_args or {}), **continuation.as_extra_args()}
    if continuation.state is not None:
        # Its computed tokens come from its cache, not from a prefix.
        params.skip_reading_prefix_cache = True
    return msgspec.structs.replace(
        request, request_id=name, prompt_token_ids=tokens, sampling_params=params
    )
