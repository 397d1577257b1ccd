"""The commands that a scheduler sends to its workers with a step."""

from collections.abc import Mapping

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.request import Request

from adakv_worker.core.manager import AdaKVManager
from adakv_worker.core.plan import Plan
from adakv_worker.core.request import CompressedRequest, Phase
from adakv_worker.messages import (
    WITHOUT_QUERIES,
    Capture,
    Compress,
    Evict,
    Recompress,
    StepCommands,
    TakeUp,
)
from adakv_worker.session_messages import Hold, Resume, SessionCommands


def step_commands(
    output: SchedulerOutput,
    manager: AdaKVManager,
    requests: Mapping[str, Request],
    take_ups: dict[str, TakeUp],
    holds: dict[str, Hold],
) -> StepCommands:
    """Return a step's commands, and have the manager expect its evictions.

    Args:
        holds: requests whose caches are held from this step on.
    """
    sessions = _session_commands(manager, holds)
    commands = StepCommands({}, {}, take_ups, {}, {}, sessions)
    scheduled = output.num_scheduled_tokens
    for request_id in manager.reserved:
        request = manager.requests.get(request_id)
        if request is not None and request.phase is Phase.RESERVED and request_id in scheduled:
            commands.compress[request_id] = _compress(request, manager.slabs_of(request_id))
    for request_id in manager.completed:
        request = manager.requests.get(request_id)
        if request is not None and request.phase is Phase.RESUMED and request_id in scheduled:
            commands.recompress[request_id] = _recompress(request.plan)
    for request_id, request in manager.prefilling.items():
        plan, computed = request.plan, requests[request_id].num_computed_tokens
        if request_id in scheduled and computed > plan.prompt_tokens - plan.query_span:
            commands.capture[request_id] = Capture(plan.prompt_tokens, plan.query_span)
    for request_id, request in manager.bounded.items():
        if request_id in scheduled:
            _command_eviction(commands, manager, request_id, request)
    return commands


def _session_commands(manager: AdaKVManager, holds: dict[str, Hold]) -> SessionCommands:
    if manager.held is None:
        return SessionCommands({}, [], [], {})
    resume = {}
    for request_id, held in manager.resuming.items():
        if held is None:
            continue
        resumed = manager.requests[request_id].plan.resumed
        assert resumed is not None
        tokens = resumed.base.tokens
        cut, slabs = held.entry_tokens - tokens, manager.slabs_of(request_id)
        resume[request_id] = Resume(held.name, tokens, cut, slabs, resumed.copies)
    manager.resuming.clear()
    return SessionCommands(
        holds, manager.held.take_parks(), manager.held.take_gone(), resume
    )  # fmt: skip


def _recompress(plan: Plan) -> Recompress:
    resumed = plan.resumed
    assert resumed is not None
    return Recompress(
        resumed.choice, plan.prompt_tokens, plan.query_span, resumed.keep, plan.slabs, resumed.among
    )


def _compress(request: CompressedRequest, slabs: list[int]) -> Compress:
    plan = request.plan
    # Where all entries stay, no queries are needed.
    choice = plan.choice if plan.keep < plan.prompt_tokens else WITHOUT_QUERIES
    return Compress(
        choice, plan.prompt_tokens, plan.query_span, plan.keep, slabs, plan.sink_tokens, plan.detail
    )


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
