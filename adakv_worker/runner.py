"""Model-runner mixin: keeps the compressed rows first, plans their step, compresses after it."""

from typing import Any

import torch
from vllm.config import set_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from adakv_worker.commands import ATTRIBUTE, Compress, Kept, StepCommands, TakeUp, commands_of
from adakv_worker.compression import Watcher
from adakv_worker.config import CompressionConfig, compression_config
from adakv_worker.folding import FoldingBuilder, Pages, Step
from adakv_worker.mapped_files import MappedFiles
from adakv_worker.model_parts import LayerParts, layer_parts
from adakv_worker.moves import CacheKind, Moved, rank_file, read_state, write_state
from adakv_worker.packed_state import StateRefused
from adakv_worker.state import CompressionState


class AdaKVRunnerMixin(GPUModelRunner):
    """For vLLM's V1 model runner. A platform adds `_bind_pages`."""

    adakv: CompressionState
    _adakv_config: CompressionConfig
    _adakv_pages: Pages
    # None outside a real step, so that profiling and warm-up stay stock.
    _adakv_step: SchedulerOutput | None = None
    _adakv_kept: Kept
    # Caches that have come for requests that have not begun here yet, by the name they came with.
    _adakv_staged: dict[str, Moved]
    _adakv_files: MappedFiles

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        # The backend looks there for whether it is on.
        with set_current_vllm_config(self.vllm_config):
            return super().get_kv_cache_spec()

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kw: Any) -> None:
        with set_current_vllm_config(self.vllm_config):
            super().initialize_kv_cache(kv_cache_config, *args, **kw)
        config = compression_config(self.vllm_config.additional_config)
        if config is None or not self.kv_caches:
            return
        self._refuse_other_backends()
        self._adakv_config = config
        self._adakv_kept = {}
        self._adakv_staged = {}
        self._adakv_files = MappedFiles()
        self._bind_pages(config)

    def _refuse_other_backends(self) -> None:
        for group in self.attn_groups[0]:
            if not isinstance(group.get_metadata_builder(), FoldingBuilder):
                raise ValueError(
                    f"adakv: compression does not work with {group.backend.get_name()}: set "
                    "attention_backend to FLASH_ATTN or TRITON_ATTN"
                )

    def _bind_pages(self, config: CompressionConfig) -> None:
        """Finds all layers' memory as pages, and makes `adakv` of it."""
        raise NotImplementedError

    def _layers(self) -> list[Any]:
        """The attention layers in the order of their caches, each told its index there."""
        (group,) = self.kv_cache_config.kv_cache_groups
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [context[name] for name in group.layer_names]
        layers.sort(key=lambda layer: layer.kv_cache.data_ptr())
        for index, layer in enumerate(layers):
            layer.adakv_index = index
        return layers

    def _parts(self, layers: list[Any]) -> list[LayerParts]:
        return layer_parts(self.get_model(), [layer.layer_name for layer in layers])

    def _update_states(self, scheduler_output: SchedulerOutput) -> Any:
        cached = scheduler_output.scheduled_cached_reqs
        gone = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        for request_id in gone | cached.resumed_req_ids:
            self.adakv.forget(request_id)
        for request_id, new_blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new_blocks is not None and request_id in self.adakv:
                self.adakv.add_slabs(request_id, new_blocks[0])
        take_up = commands_of(scheduler_output).take_up
        for new in scheduler_output.scheduled_new_reqs:
            if (command := take_up.get(new.req_id)) and command.state is not None:
                moved = self._adakv_staged[command.state]
                self.adakv.restore(new.req_id, moved.cache, list(new.block_ids[0]))
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

    def export_request(self, request_id: str, path: str, policy: str) -> list[int] | None:
        """Writes a compressed request's cache to this rank's file, between two steps.

        Returns all its tokens by now, of which the last is not in the cache; None: it is not here,
        or not compressed.

        Raises:
            OSError: there is no room for it.
        """
        request = self.requests.get(request_id)
        if request is None or request_id not in self.adakv or request.prompt_token_ids is None:
            return None
        tokens = [*request.prompt_token_ids, *request.output_token_ids]
        generator = request.generator.get_state() if request.generator is not None else None
        kind = self._cache_kind()
        header = kind.header(policy, tokens)
        file = rank_file(path, kind.rank)
        write_state(self.adakv, request_id, generator, header, file, self._adakv_files)
        return tokens

    def stage_state(self, name: str, path: str, policy: str, token_ids: list[int]) -> str | None:
        """Holds a cache ready for the request with these tokens. Returns why not, if it is refused.

        The file must last until the request has begun, or `unstage_state`.
        """
        kind = self._cache_kind()
        try:
            header = kind.header(policy, token_ids)
            self._adakv_staged[name] = read_state(
                rank_file(path, kind.rank), header, self._adakv_files
            )
        except StateRefused as error:
            return str(error)
        return None

    def unstage_state(self, name: str) -> None:
        self._adakv_staged.pop(name, None)

    def _cache_kind(self) -> CacheKind:
        layers, heads, page_tokens, head_dim = self.adakv.cache_shape
        group = get_tp_group()
        return CacheKind(
            model=self.model_config.model,
            dtype=str(self.kv_cache_dtype).removeprefix("torch."),
            page_tokens=page_tokens,
            layers=layers,
            heads=heads,
            head_dim=head_dim,
            rank=group.rank_in_group,
            ranks=group.world_size,
            packing=self.adakv.packing,
        )

    def _build_attention_metadata(self, *args: Any, **kwargs: Any) -> Any:
        if self._adakv_step is not None:
            step = self._plan_step(self._adakv_step, commands_of(self._adakv_step))
            for group in self.attn_groups[0]:
                builder = group.get_metadata_builder()
                assert isinstance(builder, FoldingBuilder)
                builder.next_step = step
        return super()._build_attention_metadata(*args, **kwargs)

    def _plan_step(self, output: SchedulerOutput, commands: StepCommands) -> Step | None:
        request_ids = self.input_batch.req_ids
        compressed = [request_id for request_id in request_ids if request_id in self.adakv]
        watchers = self._watchers(output, commands)
        if not compressed and not watchers:
            return None
        folded = None
        if compressed:
            assert request_ids[: len(compressed)] == compressed, "compressed rows must come first"
            builder = self.attn_groups[0][0].get_metadata_builder()
            assert isinstance(builder, FoldingBuilder)
            grown = self.adakv.grow(compressed)
            folded = builder.fold(grown, len(compressed), self._adakv_pages)
        return Step(folded, watchers)

    def _watchers(self, output: SchedulerOutput, commands: StepCommands) -> list[Watcher]:
        if not commands.capture and not commands.compress and not commands.evict:
            return []
        watchers: list[Watcher] = []
        start = 0
        for index, request_id in enumerate(self.input_batch.req_ids):
            count = output.num_scheduled_tokens[request_id]
            first = int(self.input_batch.num_computed_tokens_cpu[index])
            if compress := commands.compress.get(request_id):
                blocks = self._prompt_blocks(request_id, compress)
                watchers.append(self.adakv.compress(request_id, compress, blocks, start, first))
            elif evict := commands.evict.get(request_id):
                watchers.append(self.adakv.evict(request_id, evict, start))
            elif capture := commands.capture.get(request_id):
                watcher = self.adakv.capture(request_id, capture, start, first, count)
                watchers += [watcher] if watcher is not None else []
            start += count
        return watchers

    def _prompt_blocks(self, request_id: str, command: Compress) -> list[int]:
        (blocks,) = self.requests[request_id].block_ids
        return blocks[: len(blocks) - len(command.slabs)]

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        self._adakv_step = scheduler_output
        try:
            result = super().execute_model(scheduler_output, *args, **kwargs)
        finally:
            self._adakv_step = None
        commands = commands_of(scheduler_output)
        self._adakv_kept = self._finish_compressions(commands)
        self._finish_evictions(commands)
        self.adakv.drop_windows(scheduler_output.num_scheduled_tokens.keys() - commands.capture)
        if self._adakv_config.check_invariants:
            self.adakv.check()
        return result

    def _finish_compressions(self, commands: StepCommands) -> Kept:
        if not commands.compress:
            return {}
        kept = self.adakv.finish_compressions()
        for request_id, command in commands.compress.items():
            self._hold(request_id, list(command.slabs))
        return _over_ranks(kept)

    def _finish_evictions(self, commands: StepCommands) -> None:
        if commands.evict:
            self.adakv.finish_evictions()
        for request_id, command in commands.evict.items():
            (blocks,) = self.requests[request_id].block_ids
            self._hold(request_id, blocks[: command.slabs])

    def _hold(self, request_id: str, blocks: list[int]) -> None:
        """From the next step on these blocks are the request's."""
        self.requests[request_id].block_ids = (blocks,)
        row = self.input_batch.req_id_to_index[request_id]
        self.input_batch.block_table.add_row((blocks,), row)

    # vLLM's decorator hides the method's signature from the type checker.
    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:  # type: ignore[override]
        output = super().sample_tokens(grammar_output)  # type: ignore[type-var]
        if self._adakv_kept:
            kept, self._adakv_kept = self._adakv_kept, {}
            if isinstance(output, ModelRunnerOutput):
                setattr(output, ATTRIBUTE, kept)
            elif output is not None:
                _attach_later(output, kept)
        return output


def _attach_later(output: Any, kept: Kept) -> None:
    """Attaches to an asynchronous output's result, once it is there."""
    get_output = output.get_output

    def with_kept() -> ModelRunnerOutput:
        result = get_output()
        setattr(result, ATTRIBUTE, kept)
        return result

    output.get_output = with_kept


def _over_ranks(kept: Kept) -> Kept:
    """Least and most over all tensor-parallel ranks; the mean is the same on each."""
    group = get_tp_group()
    if not kept or group.world_size == 1:
        return kept
    extremes = torch.tensor([[-least, most] for _, least, most in kept.values()])
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    return {
        request_id: (kept[request_id][0], -least, most)
        for request_id, (least, most) in zip(kept, extremes.tolist(), strict=True)
    }
