"""What vLLM's requests and steps tell of answers."""

from collections.abc import Iterator

from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request, RequestStatus

from adakv_worker.core.plan import Outputs
from adakv_worker.messages import Continuation


def take_up(request: Request, continuation: Continuation) -> None:
    """Split a new request's tokens into prompt and answer. Workers still get all as its prompt."""
    prompt = continuation.prompt_tokens
    request._output_token_ids.extend(request._all_token_ids[prompt:])
    request.num_prompt_tokens = prompt
    # vLLM's statistics of prefills cannot count one that begins after its prompt.
    request.prefill_stats = None


def ended_by_itself(request: Request) -> bool:
    """Return whether a request's length is evidence of others' lengths."""
    if request.status is RequestStatus.FINISHED_ABORTED:
        # The client has left, or the front end has found a stop string.
        params = request.sampling_params
        return params is not None and bool(params.stop) and request.num_output_tokens > 0
    return request.status in (
        RequestStatus.FINISHED_STOPPED,
        RequestStatus.FINISHED_LENGTH_CAPPED,
        RequestStatus.FINISHED_REPETITION,
    )


def outputs_of(request: Request, params: SamplingParams) -> Outputs:
    """Return what is known about a request's answer."""
    answered = request.num_output_tokens
    # Benchmarks set the length of an answer.
    to_the_end = params.ignore_eos and not params.stop and not params.stop_token_ids
    least = request.max_tokens if to_the_end else params.min_tokens
    return Outputs(answered, max(0, least - answered), request.max_tokens)


def begun(output: SchedulerOutput) -> Iterator[tuple[str, int]]:
    """Yield the requests that start with this step, and their tokens from the prefix cache."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    if not cached.resumed_req_ids:
        return
    for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        if request_id in cached.resumed_req_ids:
            yield request_id, computed
