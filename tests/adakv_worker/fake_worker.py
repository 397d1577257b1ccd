"""The real scheduler with a worker that keeps no cache but answers every step."""

import random
from typing import Any

from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus
from vllm.v1.structured_output import StructuredOutputManager

from adakv_worker.core.checks import check_blocks
from adakv_worker.core.request import Phase
from adakv_worker.core.scheduler import AdaKVAsyncScheduler, AdaKVScheduler, AdaKVSchedulerMixin
from adakv_worker.messages import (
    Answer,
    Continuation,
    Kept,
    MemoryStats,
    StepCommands,
    attach_answer,
    commands_of,
)
from adakv_worker.statistics_carrier import figures_of
from tests.adakv_worker.proofs import make_proof

_STOP = 8


class CoreConfig:
    """Settings of an engine core. Not a dataclass: pytest would print pages of fields."""

    def __init__(self, vllm: VllmConfig, cache: KVCacheConfig) -> None:
        self.vllm = vllm
        self.cache = cache

    @property
    def block_size(self) -> int:
        return self.vllm.cache_config.block_size


def _prompt(length: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(9, 320) for _ in range(length)]


class Fake:
    """A scheduler and a worker that keeps no cache but answers every step.

    in_flight: steps that are scheduled before the oldest is answered; the asynchronous scheduler's
        engine keeps one.
    starts: the step in which each request was first scheduled; `ends` the one after its last.
    used_blocks: blocks that all requests held together in each step.
    preempted: names of preempted requests, in order.
    """

    def __init__(
        self, core: CoreConfig, in_flight: int, scheduler: type[Scheduler] | None = None
    ) -> None:
        if scheduler is None:
            scheduler = AdaKVAsyncScheduler if in_flight else AdaKVScheduler
        self._in_flight = in_flight
        self._unanswered: list[tuple[SchedulerOutput, ModelRunnerOutput]] = []
        self.steps = 0
        self.used_blocks: list[int] = []
        self.preempted: list[str] = []
        self.starts: dict[str, int] = {}
        self.ends: dict[str, int] = {}
        self._stops_after: dict[str, int] = {}
        self.scheduler: Any = scheduler(
            vllm_config=core.vllm,
            kv_cache_config=core.cache,
            structured_output_manager=StructuredOutputManager(core.vllm),
            block_size=core.block_size,
            hash_block_size=core.block_size,
            log_stats=True,
        )
        (self.manager,) = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        hash_function = get_hash_fn_by_name(core.vllm.cache_config.prefix_caching_hash_algo)
        init_none_hash(hash_function)
        self._hasher = get_request_block_hasher(core.block_size, hash_function)
        self.count = 0
        self.blocks = self.free_blocks
        # Position of the first token of the chunks whose queries were kept, by request.
        self._captured: dict[str, int] = {}

    @property
    def free_blocks(self) -> int:
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()

    def arrive(self, length: int, answered: int, max_tokens: int, with_state: bool) -> str:
        """Add a request that began elsewhere and has `answered` of its `max_tokens`; name it."""
        proof = make_proof(original_tokens=length, kept_mean=64.0)
        state = f"state-{self.count}" if with_state else None
        continuation = Continuation(length, state, proof if with_state else None)
        self.add(length + answered, max_tokens, 0, continuation.as_extra_args())
        return f"r{self.count - 1}"

    def add(
        self,
        length: int,
        max_tokens: int,
        seed: int,
        options: dict[str, Any],
        stops_after: int | None = None,
    ) -> None:
        """Add a request whose answer ends by itself after `stops_after` tokens, or by `max_tokens`.

        Without `stops_after` it ignores the end-of-sequence token.
        """
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, extra_args=options)
        if stops_after is None:
            params.ignore_eos = True
        else:
            params.stop_token_ids = [_STOP]
            self._stops_after[f"r{self.count}"] = stops_after
        request = Request(
            request_id=f"r{self.count}",
            prompt_token_ids=_prompt(length, seed),
            sampling_params=params,
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self.count += 1
        self.scheduler.add_request(request)

    def abort(self, which: int) -> None:
        live = sorted(self.scheduler.requests)
        if live:
            self.scheduler.finish_requests(live[which % len(live)], RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        output = self.scheduler.schedule()
        commands = commands_of(output)
        self._check_commands(commands, output)
        self._note_captures(commands, output)
        self.steps += 1
        for request_id in output.num_scheduled_tokens:
            self.starts.setdefault(request_id, self.steps)
            self.ends[request_id] = self.steps
        self.used_blocks.append(self.blocks - self.free_blocks)
        self.preempted += output.preempted_req_ids or ()
        self._unanswered.append((output, self._answer(commands, output)))
        self._answer_all_but(self._in_flight)
        if isinstance(self.scheduler, AdaKVSchedulerMixin):
            check_blocks(self.manager)
            self._check_running()

    def _answer_all_but(self, count: int) -> None:
        while len(self._unanswered) > count:
            self.scheduler.update_from_output(*self._unanswered.pop(0))

    def _check_commands(self, commands: StepCommands, output: SchedulerOutput) -> None:
        scheduled = output.num_scheduled_tokens
        for request_id, taken in commands.take_up.items():
            # Its cache is placed in this step, which computes only the last token.
            assert taken.state is None or scheduled[request_id] == 1
        for request_id, command in commands.compress.items():
            # All of its tokens are there, and none but those.
            assert command.prompt_tokens == self.scheduler.requests[request_id].num_computed_tokens
            # The worker writes slabs in this step: all must still be the request's.
            blocks = self.manager.req_to_blocks[request_id]
            assert {*command.slabs} <= {block.block_id for block in blocks}
            # Earlier chunks' tokens in the window were captured then.
            first = command.prompt_tokens - scheduled[request_id]
            captured = self._captured.pop(request_id, first)
            assert captured <= command.prompt_tokens - command.query_span
        for request_id, evict in commands.evict.items():
            assert len(self.manager.req_to_blocks[request_id]) >= evict.slabs
            assert scheduled[request_id] == 1
            # The window's queries of earlier steps were captured then.
            if evict.query_span > 1:
                assert self._captured.pop(request_id) <= evict.tokens - evict.query_span

    def _note_captures(self, commands: StepCommands, output: SchedulerOutput) -> None:
        for request_id in commands.capture:
            computed = self.scheduler.requests[request_id].num_computed_tokens
            first = computed - output.num_scheduled_tokens[request_id]
            self._captured[request_id] = min(first, self._captured.get(request_id, first))
        for request_id in {*(output.preempted_req_ids or ()), *output.finished_req_ids}:
            self._captured.pop(request_id, None)

    def _answer(self, commands: StepCommands, output: SchedulerOutput) -> ModelRunnerOutput:
        names = list(output.num_scheduled_tokens)
        tokens = [self._tokens(self.scheduler.requests[name]) for name in names]
        answer = ModelRunnerOutput(names, {name: i for i, name in enumerate(names)}, tokens)
        kept = dict.fromkeys(commands.compress, Kept(64.0, 1, 99))
        attach_answer(answer, Answer(kept, []))
        return answer

    def _tokens(self, request: Request) -> list[int]:
        if request.num_computed_tokens < request.num_tokens:
            return []
        answered = request.num_computed_tokens - request.num_prompt_tokens + 1
        return [_STOP if answered >= self._stops_after.get(request.request_id, 1 << 30) else 7]

    def finish(self) -> None:
        """Step until nothing is left to do or to answer."""
        for _ in range(20_000):
            if not self.scheduler.has_unfinished_requests():
                break
            self.step()
        assert not self.scheduler.has_unfinished_requests()
        self._answer_all_but(0)
        self.step()
        self._answer_all_but(0)

    def _check_running(self) -> None:
        for request in self.scheduler.running:
            known = self.manager.requests[request.request_id]
            if known.phase is Phase.COMPRESSED:
                held = len(self.manager.req_to_blocks[request.request_id])
                assert held >= known.plan.blocks_at(request.num_computed_tokens)

    def memory_stats(self) -> MemoryStats:
        """Return the statistics of the last step."""
        stats = self.scheduler.make_stats()
        assert stats is not None
        figures = figures_of(stats)
        assert figures is not None
        return figures.memory
