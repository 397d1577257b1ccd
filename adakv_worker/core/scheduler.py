"""Scheduler mixin: plans compressions, commands the workers, and attaches the proof to outputs."""

import time
from collections.abc import Iterator
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from adakv_worker.config import CompressionConfig, compression_config
from adakv_worker.core.checks import check_blocks
from adakv_worker.core.manager import AdaKVManager
from adakv_worker.core.plan import Outputs, Phase, Plan, make_plan, resumed_plan
from adakv_worker.core.proofs import Proofs
from adakv_worker.core.recomputes import Recomputes
from adakv_worker.core.waiting_book import WaitingBook
from adakv_worker.messages import (
    WITHOUT_QUERIES,
    Capture,
    Compress,
    Continuation,
    Evict,
    MemoryStats,
    StepCommands,
    StepFigures,
    TakeUp,
    answer_of,
    attach_commands,
    commands_of,
    continuation_in,
)
from adakv_worker.options import budget_of
from adakv_worker.refusals import (
    refuse_unsupported,
    refuse_unsupported_policy,
    require_classes,
)
from adakv_worker.spec import AdaKVSpec
from adakv_worker.statistics_carrier import attach_figures

# Below vLLM's own logger, so that its settings show it.
logger = init_logger("vllm.adakv")

# Counting takes a millisecond for some ten thousand blocks.
_COUNT_EVICTABLE_EVERY_S = 1.0
# Looks at every running request; reports to the router are no closer than this.
_COUNT_GROWTH_EVERY_S = 0.1


class AdaKVSchedulerMixin(Scheduler):
    """Knows vLLM's scheduler only; everything about memory is in `AdaKVManager`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = compression_config(self.vllm_config.additional_config)
        self._adakv = config or CompressionConfig(enabled=False)
        self._proofs = Proofs()
        # Requests that go on here; without their states once they have begun.
        self._to_take_up: dict[str, Continuation] = {}
        self._recomputes = Recomputes()
        self._queue = WaitingBook()
        self._growth_blocks = 0
        self._count_growth_at = 0.0
        self._evictable_blocks = 0
        self._count_evictable_at = 0.0
        self._last_received: str | None = None
        # Presets that the model does not support, with the reason.
        self._unsupported: dict[str, str] = {}
        self._manager: AdaKVManager | None = None
        if config is None:
            return
        refuse_unsupported(self.vllm_config)
        require_classes(self.vllm_config)
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        if not isinstance(manager, AdaKVManager):
            raise ValueError("adakv: compression does not work with this attention backend")
        self._manager = manager
        assert isinstance(manager.kv_cache_spec, AdaKVSpec)
        self._unsupported = dict(manager.kv_cache_spec.unsupported)
        refuse_unsupported_policy(config, self._unsupported)
        self._log_plan()

    def _log_plan(self) -> None:
        config = self._adakv
        budget = budget_of(None, config, self._unsupported)
        pool = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        example = make_plan(budget, 4096, 1024, self.block_size, pool)
        logger.info(
            "adakv: model %s, policy %s, budget %d tokens, keep ratio %g: a prompt of 4096 tokens "
            "holds %d blocks, then %d (%s)",
            self.vllm_config.model_config.model, config.policy, config.budget_tokens,
            config.keep_ratio, example.prompt_blocks,
            example.slabs if example.active else example.prompt_blocks,
            "compressed" if example.active else example.skipped,
        )  # fmt: skip

    def add_request(self, request: Request) -> None:
        continuation = continuation_in(request.sampling_params)
        if continuation is not None and self._manager is not None:
            _take_up(request, continuation)
            self._to_take_up[request.request_id] = continuation
            if continuation.state is not None and continuation.proof is not None:
                self._proofs.put(request.request_id, continuation.proof)
            if continuation.state is None:
                self._recomputes.lose(request.request_id, request.num_tokens - 1)
        is_new = request.request_id not in self.requests
        super().add_request(request)
        self._last_received = request.request_id
        if is_new and self._manager is not None:
            self._enqueue(request)
            if request.sampling_params is not None and request.sampling_params.stop:
                self._proofs.always_attach(request.request_id)

    def _enqueue(self, request: Request) -> None:
        """A request waits, for the first time or once more."""
        tokens = request.num_tokens - request.num_computed_tokens
        plan = self._plan(request)
        self._queue.add(request.request_id, plan.blocks_to_start if plan else 0, tokens)

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        plan = self._plan(request)
        if plan is not None and plan.phase is Phase.COMPRESSED:
            # All but the last token come with its cache, none of them in blocks.
            return self.kv_cache_manager.empty_kv_cache_blocks, request.num_tokens - 1, 0, False
        blocks, hit, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        if plan is not None and plan.active and hit > plan.longest_hit():
            hit = plan.longest_hit()
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, hit)
        return blocks, hit, boundary, diverged

    def _plan(self, request: Request) -> Plan | None:
        """Plan a request that waits, once for the tokens that it has.

        Of an asynchronous step a token may still come after the request was preempted.
        """
        if self._manager is None or request.sampling_params is None:
            return None
        plan = self._manager.plans.get(request.request_id)
        if plan is None or plan.start_tokens != request.num_tokens:
            plan = self._manager.plans[request.request_id] = self._new_plan(request)
        return plan

    def _new_plan(self, request: Request) -> Plan:
        params = request.sampling_params
        # Servers refuse what is out of bounds at admission. `vllm.LLM` does not have the operator's
        # bounds there, and an engine must not die of a request.
        extra_args = params.extra_args if params is not None else None
        budget = budget_of(extra_args, self._adakv, self._unsupported)
        remaining_outputs = request.max_tokens - request.num_output_tokens
        continuation = self._to_take_up.get(request.request_id)
        if continuation is not None and continuation.state is not None:
            assert continuation.proof is not None
            return resumed_plan(
                budget,
                continuation.proof,
                request.num_tokens,
                remaining_outputs,
                self.block_size,
                _outputs_of(request),
            )
        return make_plan(
            budget,
            request.num_tokens,
            remaining_outputs,
            self.block_size,
            self.kv_cache_manager.block_pool.num_gpu_blocks - 1,
            outputs=_outputs_of(request),
            resumable=request.resumable,
        )

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        output = super().schedule(*args, **kwargs)
        if self._manager is not None:
            attach_commands(output, self._commands(output, self._manager))
            for request_id, hit_tokens in _begun(output):
                self._recomputes.begin(request_id, hit_tokens)
                self._queue.remove(request_id)
            for request_id in self._manager.take_decided():
                self._proofs.note_whole(request_id, self._manager.plans.get(request_id))
        return output

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._recomputes.lose(request.request_id, request.num_computed_tokens)
        super()._preempt_request(request, *args, **kwargs)
        if self._manager is not None:
            self._enqueue(request)

    def _commands(self, output: SchedulerOutput, manager: AdaKVManager) -> StepCommands:
        commands = StepCommands({}, {}, self._take_ups(output), {})
        scheduled = output.num_scheduled_tokens
        for request_id in manager.reserved:
            plan = manager.plans.get(request_id)
            if plan is None or plan.phase is not Phase.RESERVED or request_id not in scheduled:
                continue
            commands.compress[request_id] = Compress(
                # Where all stay, nothing need be looked at.
                plan.choice if plan.keep < plan.prompt_tokens else WITHOUT_QUERIES,
                plan.prompt_tokens,
                plan.query_span,
                plan.keep,
                manager.slabs_of(request_id),
                plan.sink_tokens,
            )
        for request_id, plan in manager.prefilling.items():
            computed = self.requests[request_id].num_computed_tokens
            if request_id in scheduled and computed > plan.prompt_tokens - plan.query_span:
                commands.capture[request_id] = Capture(plan.prompt_tokens, plan.query_span)
        for request_id, plan in manager.bounded.items():
            if request_id in scheduled:
                _command_eviction(commands, manager, request_id, plan)
        return commands

    def _take_ups(self, output: SchedulerOutput) -> dict[str, TakeUp]:
        """Return the commands for requests that start, or start again.

        Model Runner V2 forgets preempted requests, and gets them as new ones later.
        """
        begun = {}
        for request in output.scheduled_new_reqs:
            if continuation := self._to_take_up.get(request.req_id):
                begun[request.req_id] = TakeUp(continuation.prompt_tokens, continuation.state)
                self._to_take_up[request.req_id] = Continuation(continuation.prompt_tokens)
        return begun

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if self._manager is not None:
            evicted = commands_of(scheduler_output).evict
            self._proofs.note_step(self._manager.plans, evicted, answer_of(model_runner_output))
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._proofs.attach(outputs)
        if self._adakv.check_invariants and self._manager is not None:
            check_blocks(self._manager)
            self._check_queue()
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        counts, proofs = self._proofs.take_counts(), self._proofs.take_new()
        if stats is not None and self._manager is not None:
            memory = self._memory_stats(self._manager)._replace(**counts)
            attach_figures(stats, StepFigures(memory, proofs, self._last_received))
        return stats

    def _memory_stats(self, manager: AdaKVManager) -> MemoryStats:
        idle = not self.running and not self._queue
        now = time.monotonic()
        # Once nothing runs, no step comes to count again.
        if now >= self._count_evictable_at or idle:
            self._count_evictable_at = now + _COUNT_EVICTABLE_EVERY_S
            self._evictable_blocks = manager.evictable_blocks()
        if now >= self._count_growth_at or idle:
            self._count_growth_at = now + _COUNT_GROWTH_EVERY_S
            self._growth_blocks = manager.growth_blocks()
        prefilling = sum(
            request.num_tokens - request.num_computed_tokens for request in self._inflight_prefills
        )
        return manager.memory_stats()._replace(
            growth_blocks=self._growth_blocks,
            waiting_blocks=self._queue.blocks,
            queued_prefill_tokens=self._queue.prefill_tokens + prefilling,
            evictable_blocks=self._evictable_blocks,
            recomputed_tokens=self._recomputes.tokens,
        )

    def _check_queue(self) -> None:
        waiting = {r.request_id for r in (*self.waiting, *self.kv_holding_waiting)}
        assert self._queue.names <= waiting, "a request is counted as waiting that does not wait"

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self._manager is not None and _ended_by_itself(request):
            lengths = self._manager.output_lengths
            lengths.note(request.max_tokens, request.num_output_tokens)
        self._recomputes.forget(request.request_id)
        self._to_take_up.pop(request.request_id, None)
        self._queue.remove(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        finished = super().finish_requests(*args, **kwargs)
        for request in finished:
            self._proofs.forget(request.request_id)
            self._to_take_up.pop(request.request_id, None)
        return finished


def _command_eviction(
    commands: StepCommands, manager: AdaKVManager, request_id: str, plan: Plan
) -> None:
    """Commands a bounded request's eviction at the end of this step, or what a later one needs."""
    span = plan.eviction_span
    if plan.evicts:
        assert plan.bound is not None
        commands.evict[request_id] = Evict(
            plan.choice,
            plan.num_tokens,
            span,
            plan.bound.budget_tokens,
            manager.evict(request_id),
        )
    elif (tokens := plan.next_eviction) is not None and plan.num_tokens > tokens - span:
        commands.capture[request_id] = Capture(tokens, span)


def _take_up(request: Request, continuation: Continuation) -> None:
    """Split a new request's tokens into prompt and answer. Workers still get all as its prompt."""
    prompt = continuation.prompt_tokens
    request._output_token_ids.extend(request._all_token_ids[prompt:])
    request.num_prompt_tokens = prompt
    # vLLM's statistics of prefills cannot count one that begins after its prompt.
    request.prefill_stats = None


def _ended_by_itself(request: Request) -> bool:
    """Whether a request's length says something about others'."""
    if request.status is RequestStatus.FINISHED_ABORTED:
        # A client that has left, or a stop string: the front end found it.
        params = request.sampling_params
        return params is not None and bool(params.stop) and request.num_output_tokens > 0
    return request.status in (
        RequestStatus.FINISHED_STOPPED,
        RequestStatus.FINISHED_LENGTH_CAPPED,
        RequestStatus.FINISHED_REPETITION,
    )


def _outputs_of(request: Request) -> Outputs:
    params = request.sampling_params
    answered = request.num_output_tokens
    least = 0
    if params is not None:
        # Benchmarks say how long an answer will be.
        to_the_end = params.ignore_eos and not params.stop and not params.stop_token_ids
        least = request.max_tokens if to_the_end else params.min_tokens
    return Outputs(answered, max(0, least - answered), request.max_tokens)


def _begun(output: SchedulerOutput) -> Iterator[tuple[str, int]]:
    """Yield requests that begin with this step, or begin again, and what they hit as a prefix."""
    for new in output.scheduled_new_reqs:
        yield new.req_id, new.num_computed_tokens
    cached = output.scheduled_cached_reqs
    if not cached.resumed_req_ids:
        return
    for request_id, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
        if request_id in cached.resumed_req_ids:
            yield request_id, computed


class AdaKVScheduler(AdaKVSchedulerMixin):
    """The synchronous scheduler with compression."""


class AdaKVAsyncScheduler(AdaKVSchedulerMixin, AsyncScheduler):
    """The asynchronous scheduler with compression."""
