"""Our model runner on vLLM's Model Runner V1."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from adakv_worker.messages import TakeUp, commands_of
from adakv_worker.worker.base import AdaKVRunner
from adakv_worker.worker.step import Row


class BatchV1:
    """The requests of a Model Runner V1."""

    def __init__(self, runner: GPUModelRunner) -> None:
        self._runner = runner

    def blocks(self, request_id: str) -> list[int]:
        (blocks,) = self._runner.requests[request_id].block_ids
        return blocks

    def replace_blocks(self, blocks: Mapping[str, list[int]]) -> None:
        batch = self._runner.input_batch
        for request_id, own in blocks.items():
            self._runner.requests[request_id].block_ids = (own,)
            batch.block_table.add_row((own,), batch.req_id_to_index[request_id])

    def tokens(self, request_id: str) -> list[int] | None:
        request = self._runner.requests.get(request_id)
        if request is None or request.prompt_token_ids is None:
            return None
        return [*request.prompt_token_ids, *request.output_token_ids]

    def random_state(self, request_id: str) -> Tensor | None:
        generator = self._runner.requests[request_id].generator
        return generator.get_state() if generator is not None else None


class AdaKVRunnerV1(AdaKVRunner, GPUModelRunner):
    """Mixin that keeps the compressed rows of the persistent batch first."""

    # Whether a full CUDA graph runs this step.
    _adakv_replays = False
    # Whether vLLM captures a full CUDA graph, or warms up for it.
    _adakv_captures = False

    def _make_batch(self) -> BatchV1:
        return BatchV1(self)

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        cached = scheduler_output.scheduled_cached_reqs
        gone = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        for request_id in gone | cached.resumed_req_ids:
            self.adakv.state.forget(request_id)
        self.adakv.add_slabs(scheduler_output)
        self.adakv.place_caches(scheduler_output)
        return super()._update_states(scheduler_output)

    def _may_reorder_batch(self, scheduler_output: SchedulerOutput) -> None:
        # The new requests are in the batch here, and its sampling metadata is not made yet.
        for request_id, command in commands_of(scheduler_output).take_up.items():
            self._take_up(request_id, command)
        super()._may_reorder_batch(scheduler_output)
        batch, tokens = self.input_batch, scheduler_output.num_scheduled_tokens
        first_other = 0
        # Compressed requests with one token, then those with several.
        for several in (False, True):
            for index in range(first_other, batch.num_reqs):
                name = batch.req_ids[index]
                if name in self.adakv.state and (tokens[name] > 1) == several:
                    if index != first_other:
                        batch.swap_states(index, first_other)
                    first_other += 1

    def _take_up(self, request_id: str, command: TakeUp) -> None:
        """Split a new request's tokens into prompt and answer, and set its random generator."""
        request = self.requests[request_id]
        assert request.prompt_token_ids is not None
        prompt, answer = (
            request.prompt_token_ids[: command.prompt_tokens],
            request.prompt_token_ids[command.prompt_tokens :],
        )
        request.prompt_token_ids, request.num_prompt_tokens = prompt, len(prompt)
        # In place: the batch and its logits processors hold this list.
        request.output_token_ids.extend(answer)
        row = self.input_batch.req_id_to_index[request_id]
        self.input_batch.num_prompt_tokens[row] = len(prompt)
        if command.state is None:
            return
        moved = self.adakv.moves.staged.pop(command.state, None)
        if moved is not None and moved.generator is not None and request.generator is not None:
            request.generator.set_state(moved.generator)

    def _determine_batch_execution_and_padding(self, *args: Any, **kwargs: Any) -> Any:
        if self._in_step and not self.adakv.may_replay():
            # Full graphs run uniform decodes only: see the backends' `get_cudagraph_support`.
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
            # The warm-up must call every kernel: its first call loads it, which no capture allows.
            kwargs["for_cudagraph_capture"] = True
        if self._in_step:
            rows = kwargs["num_reqs_padded"] if self._adakv_replays else None
            self.adakv.plan(self._rows(), rows)
        return super()._build_attention_metadata(*args, **kwargs)

    # vLLM's decorator hides the method's signature from the type checker.
    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:  # type: ignore[override]
        return self.adakv.attach_answer(super().sample_tokens(grammar_output))  # type: ignore[type-var]

    @property
    def _in_step(self) -> bool:
        # vLLM profiles before it has KV memory.
        return "adakv" in vars(self) and self.adakv.step is not None

    def _rows(self) -> list[Row]:
        assert self.adakv.step is not None
        tokens, batch = self.adakv.step.num_scheduled_tokens, self.input_batch
        return [
            Row(request_id, tokens[request_id], int(batch.num_computed_tokens_cpu[index]))
            for index, request_id in enumerate(batch.req_ids)
        ]
