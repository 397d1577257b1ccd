"""Our model runner on vLLM's Model Runner V1."""

from typing import Any

from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from adakv_worker.messages import TakeUp, commands_of
from adakv_worker.worker.step import AdaKVRunner, Row


class AdaKVRunnerV1(AdaKVRunner, GPUModelRunner):
    """Keeps the compressed rows of the persistent batch first."""

    # Whether this step is run by a full CUDA graph.
    _adakv_replays = False
    # Whether one is about to be captured, or is being captured.
    _adakv_captures = False

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        cached = scheduler_output.scheduled_cached_reqs
        gone = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        for request_id in gone | cached.resumed_req_ids:
            self.adakv.forget(request_id)
        self._add_slabs(scheduler_output)
        self._restore_staged(scheduler_output)
        return super()._update_states(scheduler_output)

    def _may_reorder_batch(self, scheduler_output: SchedulerOutput) -> None:
        # The requests are in the batch by now, and what is sampled by is not made of it yet.
        for request_id, command in commands_of(scheduler_output).take_up.items():
            self._take_up(request_id, command)
        super()._may_reorder_batch(scheduler_output)
        batch = self.input_batch
        first_other = 0
        for index in range(batch.num_reqs):
            if batch.req_ids[index] in self.adakv:
                if index != first_other:
                    batch.swap_states(index, first_other)
                first_other += 1

    def _take_up(self, request_id: str, command: TakeUp) -> None:
        """Tells a new request's answer so far from its prompt, and gives it its random numbers."""
        request = self.requests[request_id]
        assert request.prompt_token_ids is not None
        prompt, answer = (
            request.prompt_token_ids[: command.prompt_tokens],
            request.prompt_token_ids[command.prompt_tokens :],
        )
        request.prompt_token_ids, request.num_prompt_tokens = prompt, len(prompt)
        # In place: the batch and its logits processors have this list.
        request.output_token_ids.extend(answer)
        row = self.input_batch.req_id_to_index[request_id]
        self.input_batch.num_prompt_tokens[row] = len(prompt)
        moved = self._adakv_staged.pop(command.state, None) if command.state is not None else None
        if moved is not None and moved.generator is not None and request.generator is not None:
            request.generator.set_state(moved.generator)

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        if self._adakv_step is not None and not self._may_replay():
            # Full graphs are of uniform decodes alone: see the backends' `get_cudagraph_support`.
            kwargs["force_uniform_decode"] = False
        decided = super()._determine_batch_execution_and_padding(*args, **kwargs)
        self._adakv_replays = decided[0] is CUDAGraphMode.FULL
        return decided

    def _warmup_and_capture(
        self, desc: Any, cudagraph_runtime_mode: CUDAGraphMode, *args: Any, **kwargs: Any
    ) -> None:
        self._adakv_captures = cudagraph_runtime_mode is CUDAGraphMode.FULL
        try:
            super()._warmup_and_capture(desc, cudagraph_runtime_mode, *args, **kwargs)
        finally:
            self._adakv_captures = False

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._adakv_captures:
            # A kernel's first call loads it, which no capture allows: the warm-up calls them all.
            kwargs["for_cudagraph_capture"] = True
        if self._adakv_step is not None:
            tokens, batch = self._adakv_step.num_scheduled_tokens, self.input_batch
            rows = [
                Row(request_id, tokens[request_id], int(batch.num_computed_tokens_cpu[index]))
                for index, request_id in enumerate(batch.req_ids)
            ]
            self._plan_step(rows, kwargs["num_reqs_padded"] if self._adakv_replays else None)
        return super()._build_attention_metadata(*args, **kwargs)

    # vLLM's decorator hides the method's signature from the type checker.
    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:  # type: ignore[override]
        return self._attach_answer(super().sample_tokens(grammar_output))  # type: ignore[type-var]

    def _blocks(self, request_id: str) -> list[int]:
        (blocks,) = self.requests[request_id].block_ids
        return blocks

    def _hold(self, request_id: str, blocks: list[int]) -> None:
        self.requests[request_id].block_ids = (blocks,)
        row = self.input_batch.req_id_to_index[request_id]
        self.input_batch.block_table.add_row((blocks,), row)

    def _tokens(self, request_id: str) -> list[int] | None:
        request = self.requests.get(request_id)
        if request is None or request.prompt_token_ids is None:
            return None
        return [*request.prompt_token_ids, *request.output_token_ids]

    def _random_state(self, request_id: str) -> Tensor | None:
        generator = self.requests[request_id].generator
        return generator.get_state() if generator is not None else None
