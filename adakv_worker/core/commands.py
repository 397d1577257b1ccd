"""The commands that a scheduler sends to its workers with a step."""

from collections.abc import Mapping

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from adakv_worker.core.manager import AdaKVManager
from adakv_worker.core.request import CompressedRequest, Phase
from adakv_worker.messages import (
    WITHOUT_QUERIES,
    Capture,
    Compress,
    Evict,
    StepCommands,
    TakeUp,
)


def step_commands(
    output: SchedulerOutput,
    manager: AdaKVManager,
    requests: Mapping[str, Request],
    take_ups: dict[str, TakeUp],
) -> StepCommands:
    """Return a step's commands, and have the manager expect its evictions."""
    commands = StepCommands({}, {}, take_ups, {})
    scheduled = output.num_scheduled_tokens
    for request_id in manager.reserved:
        request = manager.requests.get(request_id)
        if request is not None and request.phase is Phase.RESERVED and request_id in scheduled:
            commands.compress[request_id] = _compress(request, manager.slabs_of(request_id))
    for request_id, request in manager.prefilling.items():
        plan, computed = request.plan, requests[request_id].num_computed_tokens
        if request_id in scheduled and computed > plan.prompt_tokens - plan.query_span:
            commands.capture[request_id] = Capture(plan.prompt_tokens, plan.query_span)
    for request_id, request in manager.bounded.items():
        if request_id in scheduled:
            _command_eviction(commands, manager, request_id, request)
    return commands


def _compress(request: CompressedRequest, slabs: list[int]) -> Compress:
    plan = request.plan
    # Where all entries stay, no queries are needed.
    choice = plan.choice if plan.keep < plan.prompt_tokens else WITHOUT_QUERIES
    return Compress(choice, plan.prompt_tokens, plan.query_span, plan.keep, slabs, plan.sink_tokens)


def _command_eviction(
    commands: StepCommands, manager: AdaKVManager, request_id: str, request: CompressedRequest
) -> None:
    """Command a bounded request's eviction in this step, or the capture that a later one needs."""
    span, tokens = request.plan.eviction_span, request.num_tokens
    if request.evicts:
        assert request.plan.bound is not None
        keep = request.plan.bound.budget_tokens
        commands.evict[request_id] = Evict(
            request.plan.choice, tokens, span, keep, manager.evict(request_id)
        )
    elif (evicts_at := request.next_eviction) is not None and tokens > evicts_at - span:
        commands.capture[request_id] = Capture(evicts_at, span)
