"""Scheduler mixin: plans compressions, commands the workers, and attaches the proof to outputs."""

import functools
import time
from dataclasses import replace
from typing import Any

from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.core.kv_cache_manager import KVCacheBlocks
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from adakv_worker.byte_budgets import settings_of
from adakv_worker.config import CompressionConfig
from adakv_worker.core.checks import check_blocks
from adakv_worker.core.commands import step_commands
from adakv_worker.core.counts import Recomputes, WaitingRequests, Work
from adakv_worker.core.figures import MemoryFigures
from adakv_worker.core.manager import AdaKVManager
from adakv_worker.core.plan import make_plan, resumed_plan
from adakv_worker.core.proofs import Proofs
from adakv_worker.core.request import CompressedRequest, Phase
from adakv_worker.core.sessions import Sessions
from adakv_worker.core.turns import Turns
from adakv_worker.core.vllm_requests import begun, ended_by_itself, outputs_of, take_up
from adakv_worker.messages import (
    Continuation,
    MemoryStats,
    StepFigures,
    TakeUp,
    answer_of,
    attach_commands,
    commands_of,
    continuation_in,
)
from adakv_worker.options import RequestBudget, budget_of
from adakv_worker.refusals import (
    refuse_unsupported,
    refuse_unsupported_policy,
    require_classes,
)
from adakv_worker.session_messages import arrival_in
from adakv_worker.spec import AdaKVSpec
from adakv_worker.statistics_carrier import attach_figures

# Below vLLM's own logger, so that its settings show it.
logger = init_logger("vllm.adakv")


class AdaKVSchedulerMixin(Scheduler):
    """Plans requests and commands the workers; `AdaKVManager` owns all that concerns memory."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = settings_of(self.vllm_config)
        self._adakv = config or CompressionConfig(enabled=False)
        self._proofs = Proofs()
        # Requests that continue here; without their states once they have begun.
        self._to_take_up: dict[str, Continuation] = {}
        self._recomputes = Recomputes()
        self._queue = WaitingRequests()
        self._last_received: str | None = None
        self._work = Work()
        self._turns = Turns()
        # Presets that the model does not support, with the reason.
        self._unsupported: dict[str, str] = {}
        self._page_tokens = self.block_size
        self._manager: AdaKVManager | None = None
        self._figures: MemoryFigures | None = None
        self._sessions: Sessions | None = None
        if config is None:
            return
        refuse_unsupported(self.vllm_config)
        require_classes(self.vllm_config)
        (manager,) = self.kv_cache_manager.coordinator.single_type_managers
        if not isinstance(manager, AdaKVManager):
            raise ValueError("adakv: compression does not work with this attention backend")
        self._manager = manager
        self._figures = MemoryFigures(manager, self._queue, self._recomputes)
        assert isinstance(manager.kv_cache_spec, AdaKVSpec)
        self._unsupported = dict(manager.kv_cache_spec.unsupported)
        self._page_tokens = manager.page_tokens
        refuse_unsupported_policy(config, self._unsupported)
        if config.sessions.enabled:
            scheduler = self.vllm_config.scheduler_config
            reach = scheduler.max_num_batched_tokens // self.block_size + scheduler.max_num_seqs
            (group,) = self.kv_cache_config.kv_cache_groups
            layers = len(group.layer_names)
            self._sessions = Sessions(config.sessions, manager, layers, reach)
        self._log_plan()

    def _log_plan(self) -> None:
        config = self._adakv
        budget = budget_of(None, config, self._unsupported)
        pool = self.kv_cache_manager.block_pool.num_gpu_blocks - 1
        example = make_plan(
            budget, 4096, 1024, self.block_size, pool, page_tokens=self._page_tokens
        )
        logger.info(
            "adakv: model %s, policy %s, budget %d tokens, keep ratio %g: a prompt of 4096 tokens "
            "holds %d blocks, then %d (%s)",
            self.vllm_config.model_config.model, config.policy, config.budget_tokens,
            config.keep_ratio, example.prompt_blocks,
            example.slabs if example.active else example.prompt_blocks,
            "compressed" if example.active else example.skipped,
        )  # fmt: skip

    def add_request(self, request: Request) -> None:
        params = request.sampling_params
        arrival = arrival_in(params.extra_args if params is not None else None)
        if arrival is not None:
            # It brings a held cache, and asks for nothing.
            if self._sessions is not None:
                self._sessions.arrive(request, arrival)
            return
        continuation = continuation_in(request.sampling_params)
        if continuation is not None and self._manager is not None:
            take_up(request, continuation)
            self._to_take_up[request.request_id] = continuation
            if continuation.state is not None and continuation.proof is not None:
                self._proofs.put(request.request_id, continuation.proof)
            if continuation.state is None:
                self._recomputes.lose(request.request_id, request.num_tokens - 1)
        is_new = request.request_id not in self.requests
        super().add_request(request)
        self._last_received = request.request_id
        self._turns.note(request)
        if is_new and self._manager is not None:
            self._enqueue(request)
            if request.sampling_params is not None and request.sampling_params.stop:
                self._proofs.always_attach(request.request_id)

    def _enqueue(self, request: Request) -> None:
        """Count a request as waiting, for the first time or once more."""
        tokens = request.num_tokens - request.num_computed_tokens
        planned = self._planned(request)
        self._queue.add(request.request_id, planned.blocks_to_start if planned else 0, tokens)
        if self._sessions is not None and request.sampling_params is not None:
            self._sessions.await_turn(request, self._budget(request))

    def _get_local_prefix_cache_hit(self, request: Request) -> tuple[KVCacheBlocks, int, int, bool]:
        planned = self._planned(request)
        if planned is not None and planned.phase is Phase.COMPRESSED:
            # Its cache brings all tokens but the last, none of them in blocks.
            return self.kv_cache_manager.empty_kv_cache_blocks, request.num_tokens - 1, 0, False
        blocks, hit, boundary, diverged = super()._get_local_prefix_cache_hit(request)
        if planned is None or planned.phase is Phase.WHOLE:
            return blocks, hit, boundary, diverged
        if hit > planned.plan.longest_hit:
            hit = planned.plan.longest_hit
            blocks = self.kv_cache_manager.truncate_computed_blocks(blocks, hit)
        if self._sessions is not None and self._manager is not None:
            plan = self._sessions.plan(request, planned.plan, self._budget(request), hit)
            self._manager.consider(request.request_id, CompressedRequest.planned(plan))
            if plan.resumed is not None:
                return (
                    self.kv_cache_manager.empty_kv_cache_blocks,
                    plan.resumed.base.tokens,
                    0,
                    False,
                )
        return blocks, hit, boundary, diverged

    def _budget(self, request: Request) -> RequestBudget:
        # Servers refuse at admission what is out of bounds. `vllm.LLM` does not have the operator's
        # bounds there, and a request must not end the engine.
        assert request.sampling_params is not None
        return budget_of(request.sampling_params.extra_args, self._adakv, self._unsupported)

    def _planned(self, request: Request) -> CompressedRequest | None:
        """Return a waiting request with a plan for the tokens that it has.

        It is planned anew when its tokens have changed: one of an asynchronous step may still come
        after the request was preempted.
        """
        params = request.sampling_params
        if self._manager is None or params is None:
            return None
        planned = self._manager.requests.get(request.request_id)
        changed = planned is None or planned.start_tokens != request.num_tokens
        # Its held cache may be gone meanwhile, or another one be better.
        if planned is None or changed or planned.phase is Phase.RESUMED:
            planned = self._new_plan(request, params)
            self._manager.consider(request.request_id, planned)
        return planned

    def _new_plan(self, request: Request, params: SamplingParams) -> CompressedRequest:
        budget = self._budget(request)
        remaining_outputs = request.max_tokens - request.num_output_tokens
        outputs = outputs_of(request, params)
        continuation = self._to_take_up.get(request.request_id)
        if continuation is not None and continuation.state is not None:
            assert continuation.proof is not None
            tokens, proof = request.num_tokens, continuation.proof
            plan = resumed_plan(
                budget, proof, tokens, remaining_outputs, self.block_size, outputs,
                self._page_tokens,
            )  # fmt: skip
            return CompressedRequest.arriving(plan, tokens)
        plan_at = functools.partial(
            make_plan, budget, remaining_outputs=remaining_outputs, block_size=self.block_size,
            pool_blocks=self.kv_cache_manager.block_pool.num_gpu_blocks - 1, outputs=outputs,
            resumable=request.resumable, page_tokens=self._page_tokens,
        )  # fmt: skip
        plan = plan_at(num_tokens=request.num_tokens)
        if continuation is not None:
            # Where it began it was not compressed for its answer's length either.
            own = plan_at(num_tokens=continuation.prompt_tokens)
            plan = replace(plan, skipped=own.skipped or plan.skipped)
        return CompressedRequest.planned(plan)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        if self._sessions is not None:
            self._sessions.order(self.waiting, time.time())
        self._turns.order(self.waiting, self.running)
        output = super().schedule(*args, **kwargs)
        if (manager := self._manager) is not None:
            take_ups = self._take_ups(output)
            holds = self._sessions.take_holds() if self._sessions is not None else {}
            commands = step_commands(output, manager, self.requests, take_ups, holds)
            attach_commands(output, commands)
            for request_id, hit_tokens in begun(output):
                self._recomputes.begin(request_id, hit_tokens)
                self._queue.remove(request_id)
                if self._sessions is not None:
                    self._sessions.end_wait(request_id)
            for request_id in manager.take_whole():
                request = manager.requests.get(request_id)
                # One that was preempted in the same step begins anew.
                if request is not None and request.phase is Phase.WHOLE:
                    self._proofs.note_whole(request_id, request.plan)
        return output

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        self._recomputes.lose(request.request_id, request.num_computed_tokens)
        self._leave(request)
        super()._preempt_request(request, *args, **kwargs)
        if self._manager is not None:
            self._enqueue(request)

    def _take_ups(self, output: SchedulerOutput) -> dict[str, TakeUp]:
        """Return the commands for requests that start in this step.

        Model Runner V2 drops preempted requests, and later gets them as new ones.
        """
        take_ups = {}
        for request in output.scheduled_new_reqs:
            if continuation := self._to_take_up.get(request.req_id):
                take_ups[request.req_id] = TakeUp(continuation.prompt_tokens, continuation.state)
                self._to_take_up[request.req_id] = Continuation(continuation.prompt_tokens)
        return take_ups

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        if self._manager is not None:
            evicted, answer = commands_of(scheduler_output).evict, answer_of(model_runner_output)
            for request_id in answer.failed:
                self._manager.fall_back(request_id)
            self._proofs.note_step(self._manager.requests, evicted, answer)
            self._work.note(scheduler_output.num_scheduled_tokens.values())
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self._proofs.attach(outputs)
        if self._adakv.check_invariants and self._manager is not None:
            check_blocks(self._manager)
            self._check_queue()
        return outputs

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        stats = super().make_stats(*args, **kwargs)
        counts, proofs = self._proofs.take_counts(), self._proofs.take_new()
        if stats is not None and self._figures is not None:
            memory = self._memory_stats(self._figures)._replace(
                decode_evictions=counts.decode_evictions,
                selection_failures=counts.selection_failures,
            )
            work = self._work.take()
            attach_figures(stats, StepFigures(memory, proofs, self._last_received, work))
        return stats

    def _memory_stats(self, figures: MemoryFigures) -> MemoryStats:
        prefilling = sum(
            request.num_tokens - request.num_computed_tokens for request in self._inflight_prefills
        )
        return figures.read(prefilling, idle=not self.running and not self._queue)

    def _check_queue(self) -> None:
        waiting = {r.request_id for r in (*self.waiting, *self.kv_holding_waiting)}
        assert self._queue.names <= waiting, "a request is counted as waiting that does not wait"
        if self._sessions is not None:
            self._sessions.check(waiting)

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        if self._manager is not None and ended_by_itself(request):
            lengths = self._manager.admission.answer_lengths
            lengths.note(request.max_tokens, request.num_output_tokens)
        self._leave(request)
        self._recomputes.forget(request.request_id)
        self._to_take_up.pop(request.request_id, None)
        if self._sessions is not None:
            self._sessions.end_wait(request.request_id)
        self._queue.remove(request.request_id)
        return super()._free_request(request, *args, **kwargs)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        # Even if requests run, for which vLLM keeps its prefixes.
        self._forget_held()
        done: bool = super().reset_prefix_cache(*args, **kwargs)
        # Requests that vLLM preempts for it leave theirs.
        self._forget_held()
        return done

    def _forget_held(self) -> None:
        if self._manager is not None and self._manager.held is not None:
            self._manager.held.forget()

    def has_requests(self) -> bool:
        """Return whether there is to be a step: also one that only frees workers' memory.

        A paused engine may have no memory to work on until it goes on.
        """
        held = self._manager.held if self._manager is not None else None
        has_gone = held is not None and held.has_gone
        return super().has_requests() or (has_gone and self.pause_state is PauseState.UNPAUSED)

    def _leave(self, request: Request) -> None:
        """Hold the cache of a request that is about to lose its blocks."""
        if self._sessions is not None and request.sampling_params is not None:
            self._sessions.leave(request, self._budget(request))

    def finish_requests(self, *args: Any, **kwargs: Any) -> Any:
        finished = super().finish_requests(*args, **kwargs)
        for request in finished:
            self._proofs.forget(request.request_id)
        return finished


class AdaKVScheduler(AdaKVSchedulerMixin):
    """The synchronous scheduler with compression."""


class AdaKVAsyncScheduler(AdaKVSchedulerMixin, AsyncScheduler):
    """The asynchronous scheduler with compression."""
