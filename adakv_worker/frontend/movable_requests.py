"""Requests of a front end that may move, as it knows them and as they go to another engine."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreOutput, EngineCoreRequest

from adakv_worker.messages import Continuation, Proof


class Departure(NamedTuple):
    """A request that has left its engine, as it goes to another. Plain data, to be pickled.

    request: as it came at first.
    tokens: all it has by now; the cache holds those but the last.
    proof: its proof of compression.
    """

    request: EngineCoreRequest
    tokens: list[int]
    proof: Proof

    @property
    def policy(self) -> str:
        return self.proof.policy


class Movable(NamedTuple):
    """A compressed request that could leave now.

    tokens: prompt and answer. tokens_left: most that its answer may still bring.
    """

    request_id: str
    tokens: int
    tokens_left: int
    proof: Proof


@dataclass
class Own:
    """A request of this front end.

    name: by which the engine core knows it now; another one for each time that it comes back.
    held: outputs since it was asked to leave; None while it was not.
    wanted: tokens of the answer that count before it leaves, once that is known.
    settled: set when so many are there, or it has ended.
    """

    request: EngineCoreRequest
    name: str
    answer: list[int] = field(default_factory=list)
    proof: Proof | None = None
    finished: bool = False
    away: bool = False
    held: list[EngineCoreOutput] | None = None
    wanted: int | None = None
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
        return self.held is None and not self.away and _has_movable_state(self.request)


def _has_movable_state(request: EngineCoreRequest) -> bool:
    """Return whether its state is all in its tokens, its cache and its random numbers."""
    params = request.sampling_params
    return (
        params is not None
        and params.structured_outputs is None
        and params.prompt_logprobs is None
        # Counted over the prompt, too, by what would take the answer so far for a part of it.
        and params.thinking_token_budget is None
        and request.prompt_token_ids is not None
        and request.prompt_embeds is None
        and request.lora_request is None
        and not request.mm_features
        and not request.resumable
    )


def continued(
    request: EngineCoreRequest, name: str, tokens: list[int], continuation: Continuation
) -> EngineCoreRequest:
    """Return a request that goes on under a new name with all of its tokens so far."""
    assert request.sampling_params is not None
    params: SamplingParams = request.sampling_params.clone()
    params.extra_args = {**(params.extra_args or {}), **continuation.as_extra_args()}
    if continuation.state is not None:
        # It hits no prefix, whatever it counts as computed.
        params.skip_reading_prefix_cache = True
    return msgspec.structs.replace(
        request, request_id=name, prompt_token_ids=tokens, sampling_params=params
    )
