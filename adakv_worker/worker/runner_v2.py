"""Our model runner on vLLM's Model Runner V2."""

from dataclasses import replace
from typing import Any

from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import GrammarOutput, NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_runner import GPUModelRunner

from adakv_worker.messages import commands_of
from adakv_worker.worker.step import AdaKVRunner, Row


class AdaKVRunnerV2(AdaKVRunner, GPUModelRunner):
    """Puts the compressed rows of each step's batch first."""

    # All blocks of each request. vLLM has them on the device alone.
    _adakv_blocks: dict[str, list[int]]
    # Whether this step is run by a full CUDA graph.
    _adakv_replays = False

    def initialize_kv_cache(self, *args: Any, **kwargs: Any) -> None:
        self._adakv_blocks = {}
        super().initialize_kv_cache(*args, **kwargs)

    def _remove_request(self, req_id: str) -> bool:
        # Ended, preempted, or about to begin.
        self._adakv_blocks.pop(req_id, None)
        self.adakv.forget(req_id)
        return super()._remove_request(req_id)

    def add_requests(self, scheduler_output: SchedulerOutput) -> None:
        begun = [
            self._with_its_prompt(new, scheduler_output)
            for new in scheduler_output.scheduled_new_reqs
        ]
        super().add_requests(replace(scheduler_output, scheduled_new_reqs=begun))
        for new in begun:
            self._adakv_blocks[new.req_id] = list(new.block_ids[0])
        self._restore_staged(scheduler_output)
        for command in commands_of(scheduler_output).take_up.values():
            # Random numbers follow from seeds and positions here: there is no state to go on from.
            if command.state is not None:
                self._adakv_staged.pop(command.state, None)

    def _with_its_prompt(self, new: NewRequestData, step: SchedulerOutput) -> NewRequestData:
        """Tells a new request's answer so far from its prompt."""
        command = commands_of(step).take_up.get(new.req_id)
        if command is None or new.prompt_token_ids is None:
            return new
        return replace(new, prompt_token_ids=new.prompt_token_ids[: command.prompt_tokens])

    def update_requests(self, scheduler_output: SchedulerOutput) -> None:
        self._add_slabs(scheduler_output)
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, new_blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new_blocks is not None:
                self._adakv_blocks[request_id] += new_blocks[0]
        super().update_requests(scheduler_output)

    def gather_batch_req_state(self, scheduler_output: SchedulerOutput, dummy_run: bool) -> Any:
        if not dummy_run:
            # vLLM sorts by the number of tokens, and leaves what is equal as it was.
            tokens = scheduler_output.num_scheduled_tokens
            first = sorted(tokens, key=lambda request_id: request_id not in self.adakv)
            ordered = {request_id: tokens[request_id] for request_id in first}
            scheduler_output = replace(scheduler_output, num_scheduled_tokens=ordered)
        batch, uniform_tokens = super().gather_batch_req_state(scheduler_output, dummy_run)
        if not dummy_run and not self._may_replay():
            # Full graphs are of uniform decodes alone: see the backends' `get_cudagraph_support`.
            uniform_tokens = None
        return batch, uniform_tokens

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
        self._plan_step(list(rows), replayed)
        return super().prepare_attn(input_batch)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        return self._attach_answer(super().sample_tokens(grammar_output))

    def _blocks(self, request_id: str) -> list[int]:
        return self._adakv_blocks[request_id]

    def _hold(self, request_id: str, blocks: list[int]) -> None:
        self._adakv_blocks[request_id] = list(blocks)
        row = self.req_states.req_id_to_index[request_id]
        self.block_tables.append_block_ids(row, (blocks,), overwrite=True)

    def _held(self) -> None:
        # Before another request may be given a row; and once, since what is staged goes through few
        # buffers, which are written to anew in turn.
        self.block_tables.apply_staged_writes()

    def _tokens(self, request_id: str) -> list[int] | None:
        row = self.req_states.req_id_to_index.get(request_id)
        if row is None:
            return None
        count = int(self.req_states.total_len.gpu[row])
        tokens: list[int] = self.req_states.all_token_ids.gpu[row, :count].tolist()
        return tokens

    def _random_state(self, request_id: str) -> Tensor | None:
        return None
