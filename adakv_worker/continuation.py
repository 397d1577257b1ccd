"""A request that began in another engine, or left this one: it goes on by its cache, or without.

It is a request whose prompt is all of its tokens so far, with a `Continuation` beside its sampling
parameters, which are those it had at first. Scheduler and workers then tell prompt and answer apart
again: penalties, least and most tokens count as if it had never been away.
"""

from typing import Any, NamedTuple

from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

# Among `SamplingParams.extra_args`, where nobody but a front end may put it: see
# `frontend.validator`.
KEY = "adakv-continuation"


class Continuation(NamedTuple):
    """
    prompt_tokens: how many of its tokens are its prompt.
    state: the name under which all workers have staged its cache; None computes it anew.
    report: its proof of compression, which tells of that cache.
    """

    prompt_tokens: int
    state: str | None = None
    report: dict[str, Any] | None = None

    def as_extra_args(self) -> dict[str, Any]:
        return {KEY: self._asdict()}


def continuation_of(request: Request) -> Continuation | None:
    """Return a scheduler's request's continuation, if it is one."""
    return continuation_in(request.sampling_params)


def continuation_in(params: SamplingParams | None) -> Continuation | None:
    """Return the continuation beside a request's sampling parameters, if there is one."""
    value = (params.extra_args or {}).get(KEY) if params is not None else None
    return Continuation(**value) if isinstance(value, dict) else None


def take_up(request: Request, continuation: Continuation) -> None:
    """Tells a new request's answer so far from its prompt. Workers still get it all as a prompt."""
    prompt = continuation.prompt_tokens
    request._output_token_ids.extend(request._all_token_ids[prompt:])
    request.num_prompt_tokens = prompt
    # vLLM's statistics of prefills know of none that begins after its prompt.
    request.prefill_stats = None
