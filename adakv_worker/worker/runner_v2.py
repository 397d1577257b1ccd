"""Our model runner on vLLM's Model Runner V2."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import BatchReqState, GPUModelRunner

from adakv_worker.messages import commands_of
from adakv_worker.worker.base import AdaKVRunner
from adakv_worker.worker.step import Row


class BatchV2:
    """The requests of a Model Runner V2.

    vLLM has their blocks on the device only: this keeps a copy.
    """

    def __init__(self, runner: GPUModelRunner) -> None:
        self._runner = runner
        self._blocks: dict[str, list[int]] = {}

    def add(self, request_id: str, blocks: list[int]) -> None:
        """Note the blocks of a request that begins."""
        self._blocks[request_id] = list(blocks)

    def extend(self, request_id: str, blocks: list[int]) -> None:
        """Note further blocks of a request."""
        self._blocks[request_id] += blocks

    def remove(self, request_id: str) -> None:
        """Forget a request, if it is here."""
        self._blocks.pop(request_id, None)

    def blocks(self, request_id: str) -> list[int]:
        return self._blocks[request_id]

    def replace_blocks(self, blocks: Mapping[str, list[int]]) -> None:
        tables = self._runner.block_tables
        for request_id, own in blocks.items():
            self._blocks[request_id] = list(own)
            row = self._runner.req_states.req_id_to_index[request_id]
            tables.append_block_ids(row, (own,), overwrite=True)
        # Before another request can get one of the rows; and once for all requests, since vLLM
        # stages writes in few buffers, which it reuses in turn.
        tables.apply_staged_writes()

    def tokens(self, request_id: str) -> list[int] | None:
        states = self._runner.req_states
        row = states.req_id_to_index.get(request_id)
        if row is None:
            return None
        count = int(states.total_len.gpu[row])
        tokens: list[int] = states.all_token_ids.gpu[row, :count].tolist()
        return tokens

    def random_state(self, request_id: str) -> None:
        """Return None: random numbers follow from seeds and positions."""


class AdaKVRunnerV2(AdaKVRunner, GPUModelRunner):
    """Mixin that puts the compressed rows of each step's batch first."""

    _adakv_batch: BatchV2
    # Whether a full CUDA graph runs this step.
    _adakv_replays = False

    def _make_batch(self) -> BatchV2:
        self._adakv_batch = BatchV2(self)
        return self._adakv_batch

    def _remove_request(self, req_id: str) -> bool:
        # vLLM calls this for requests that end, are preempted, or are about to begin.
        self._adakv_batch.remove(req_id)
        self.adakv.state.forget(req_id)
        return super()._remove_request(req_id)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        begun = [
            self._with_its_prompt(new, scheduler_output)
            for new in scheduler_output.scheduled_new_reqs
        ]
        super().add_requests(replace(scheduler_output, scheduled_new_reqs=begun))
        for new in begun:
            self._adakv_batch.add(new.req_id, new.block_ids[0])
        self.adakv.place_caches(scheduler_output)
        for command in commands_of(scheduler_output).take_up.values():
            if command.state is not None:
                self.adakv.moves.unstage(command.state)

    def _with_its_prompt(self, new: NewRequestData, step: SchedulerOutput) -> NewRequestData:
        """Return a new request whose prompt does not include its answer so far."""
        command = commands_of(step).take_up.get(new.req_id)
        if command is None or new.prompt_token_ids is None:
            return new
        return replace(new, prompt_token_ids=new.prompt_token_ids[: command.prompt_tokens])

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        self.adakv.add_slabs(scheduler_output)
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, new_blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new_blocks is not None:
                self._adakv_batch.extend(request_id, new_blocks[0])
        super().update_requests(scheduler_output)

    def gather_batch_req_state(self, scheduler_output: SchedulerOutput, dummy_run: bool) -> Any:
        batch, uniform_tokens = super().gather_batch_req_state(scheduler_output, dummy_run)
        if batch is None or dummy_run:
            return batch, uniform_tokens
        if not self.adakv.may_replay():
            # Full graphs run uniform decodes only: see the backends' `get_cudagraph_support`.
            uniform_tokens = None
        return self._compressed_first(batch), uniform_tokens

    def _compressed_first(self, batch: BatchReqState) -> BatchReqState:
        """Return the batch with compressed requests first, those with one token before others."""
        tokens = batch.num_scheduled_tokens.tolist()
        # Other requests stay in vLLM's order.
        ranks = [
            1 + (count > 1) if name in self.adakv.state else 3
            for name, count in zip(batch.req_ids, tokens, strict=True)
        ]
        order = np.argsort(ranks, kind="stable")
        in_order: dict[str, Any] = {
            field: value[order] for field, value in batch._asdict().items()
            if isinstance(value, np.ndarray)
        }  # fmt: skip
        return batch._replace(req_ids=[batch.req_ids[index] for index in order], **in_order)

    def prepare_inputs(
        self,
        scheduler_output: SchedulerOutput,
        batch_req_state: Any,
        batch_desc: BatchExecutionDescriptor,
        num_active_loras: int,
    ) -> InputBatch:
        self._adakv_replays = batch_desc.cg_mode is CUDAGraphMode.FULL
        return super().prepare_inputs(
            scheduler_output, batch_req_state, batch_desc, num_active_loras
        )

    def prepare_attn(self, input_batch: InputBatch) -> Any:
        rows = map(
            Row,
            input_batch.req_ids,
            input_batch.num_scheduled_tokens.tolist(),
            input_batch.num_computed_tokens_np.tolist(),
        )
        replayed = input_batch.num_reqs_after_padding if self._adakv_replays else None
        self.adakv.plan(list(rows), replayed)
        return super().prepare_attn(input_batch)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        return self.adakv.attach_answer(super().sample_tokens(grammar_output))
