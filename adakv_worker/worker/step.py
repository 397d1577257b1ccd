"""What our model runners do in every step, whichever of vLLM's two versions they are made of."""

from collections.abc import Collection
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed.parallel_state import get_tp_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import ModelRunnerOutput

from adakv_worker.attention.folding import FoldingBuilder, Pages, Step
from adakv_worker.attention.watcher import Watcher
from adakv_worker.config import CompressionConfig, compression_config
from adakv_worker.messages import (
    NO_ANSWER,
    Answer,
    Compress,
    Kept,
    StateRefused,
    StepCommands,
    attach_answer,
    commands_of,
)
from adakv_worker.spec import AdaKVSpec
from adakv_worker.worker.mapped_files import MappedFiles
from adakv_worker.worker.model_parts import LayerParts, layer_parts
from adakv_worker.worker.moves import CacheKind, Moved, rank_file, read_state, write_state
from adakv_worker.worker.requests import CompressionState
from adakv_worker.worker.supported_policies import unsupported_presets
from adakv_worker.worker.warm_up import warm_up


class Row(NamedTuple):
    """A request in the batch: its tokens in this step, and those computed before."""

    request_id: str
    tokens: int
    computed: int


class AdaKVRunner:
    """Before one of vLLM's runners.

    A platform adds `_bind_pages`; a version the batch's order, `_plan_step` with its rows, and what
    is below it here.
    """

    # vLLM's own.
    vllm_config: VllmConfig
    model_config: Any
    kv_cache_config: KVCacheConfig
    kv_cache_dtype: Any
    kv_caches: Any
    attn_groups: Any
    get_model: Any

    adakv: CompressionState
    _adakv_config: CompressionConfig
    # Presets that the model does not support, with the reason.
    _adakv_unsupported: dict[str, str]
    _adakv_pages: Pages
    # None outside a real step, so that profiling and warm-up stay stock.
    _adakv_step: SchedulerOutput | None = None
    _adakv_answer: Answer
    # Caches that have come for requests that have not begun here yet, by the name they came with.
    _adakv_staged: dict[str, Moved]
    _adakv_files: MappedFiles

    def _plan_step(self, rows: list[Row], graph_rows: int | None = None) -> None:
        """Before the metadata of a real step's attention are made; compressed rows come first.

        Args:
            graph_rows: of the full CUDA graph that the step is run by, if it is by one.
        """
        assert self._adakv_step is not None
        compressed = [row.request_id for row in rows if row.request_id in self.adakv]
        first = [row.request_id for row in rows[: len(compressed)]]
        assert first == compressed, "compressed rows must come first"
        for request_id, tokens, _ in rows[: len(compressed)]:
            assert tokens == 1, f"{request_id}: a compressed request takes one token a step"
        watchers = self._watchers(rows, commands_of(self._adakv_step))
        grown = None
        if compressed or graph_rows is not None:
            grown = self.adakv.grow(compressed, graph_rows)
        for group in self.attn_groups[0]:
            builder = group.get_metadata_builder()
            assert isinstance(builder, FoldingBuilder)
            folded = None
            if grown is not None:
                fold = builder.fold if graph_rows is None else builder.fold_for_graph
                folded = fold(grown, len(compressed), self._adakv_pages)
            builder.next_step = Step(folded, watchers) if folded or watchers else None

    def _may_replay(self) -> bool:
        """Whether a full CUDA graph may run this step, if it is of decodes alone."""
        assert self._adakv_step is not None
        commands = commands_of(self._adakv_step)
        # What watches a layer is no part of a graph.
        if commands.capture or commands.compress or commands.evict:
            return False
        rows = self.adakv.rows(self._adakv_step.num_scheduled_tokens)
        return self.adakv.tables.fits_graphs(rows)

    def _lengths_changed(self, request_ids: Collection[str]) -> None:
        """These requests' heads are of other lengths, by more than the step's token."""

    def _bind_pages(self, config: CompressionConfig) -> None:
        """Finds all layers' memory as pages, and makes `adakv` of it."""
        raise NotImplementedError

    def _blocks(self, request_id: str) -> list[int]:
        """All blocks of a request in the batch."""
        raise NotImplementedError

    def _hold(self, request_id: str, blocks: list[int]) -> None:
        """From the next step on these blocks are the request's."""
        raise NotImplementedError

    def _held(self) -> None:
        """After all of a step's `_hold`. The device has been waited for."""

    def _tokens(self, request_id: str) -> list[int] | None:
        """All tokens of a request by now, between two steps. None: it is not here."""
        raise NotImplementedError

    def _random_state(self, request_id: str) -> Tensor | None:
        """What its next random numbers depend on, beside its seed and its tokens."""
        raise NotImplementedError

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        stock: Any = super()
        # The backend looks there for whether it is on.
        with set_current_vllm_config(self.vllm_config):
            specs: dict[str, KVCacheSpec] = stock.get_kv_cache_spec()
        if all(isinstance(spec, AdaKVSpec) for spec in specs.values()) and specs:
            unsupported = unsupported_presets(layer_parts(self.get_model(), list(specs)))
            self._adakv_unsupported = unsupported
            return {
                name: replace(spec, unsupported=tuple(unsupported.items()))  # type: ignore[call-arg]
                for name, spec in specs.items()
            }
        return specs

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kw: Any) -> None:
        stock: Any = super()
        # Of a trial of CUDA graphs: its memory is to be free before the real one is taken.
        for name in ("adakv", "_adakv_pages", "_adakv_tables"):
            vars(self).pop(name, None)
        with set_current_vllm_config(self.vllm_config):
            stock.initialize_kv_cache(kv_cache_config, *args, **kw)
        config = compression_config(self.vllm_config.additional_config)
        if config is None or not self.kv_caches:
            return
        self._refuse_other_backends()
        self._adakv_config = config
        self._adakv_answer = NO_ANSWER
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

    def _watchers(self, rows: list[Row], commands: StepCommands) -> list[Watcher]:
        if not commands.capture and not commands.compress and not commands.evict:
            return []
        watchers: list[Watcher] = []
        start = 0
        for request_id, count, first in rows:
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
        blocks = self._blocks(request_id)
        return blocks[: len(blocks) - len(command.slabs)]

    def _add_slabs(self, scheduler_output: SchedulerOutput) -> None:
        cached = scheduler_output.scheduled_cached_reqs
        for request_id, new_blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if new_blocks is not None and request_id in self.adakv:
                self.adakv.add_slabs(request_id, new_blocks[0])

    def _restore_staged(self, scheduler_output: SchedulerOutput) -> None:
        take_up = commands_of(scheduler_output).take_up
        for new in scheduler_output.scheduled_new_reqs:
            if (command := take_up.get(new.req_id)) and command.state is not None:
                moved = self._adakv_staged[command.state]
                self.adakv.restore(new.req_id, moved.cache, list(new.block_ids[0]))
                self._lengths_changed([new.req_id])

    def warm_up_compression(self) -> None:
        """Before the first request, whose blocks it overwrites."""
        blocks = self.kv_cache_config.num_blocks
        warm_up(self.adakv, self._adakv_config, blocks, self._adakv_unsupported)

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        # Model Runner V2 warms up by this method, too.
        if kwargs.get("dummy_run"):
            return stock.execute_model(scheduler_output, *args, **kwargs)
        self._adakv_step = scheduler_output
        try:
            result = stock.execute_model(scheduler_output, *args, **kwargs)
        finally:
            self._adakv_step = None
        commands = commands_of(scheduler_output)
        self._adakv_answer = self._finish(commands)
        if commands.compress or commands.evict:
            self._held()
        self.adakv.drop_windows(scheduler_output.num_scheduled_tokens.keys() - commands.capture)
        if self._adakv_config.check_invariants:
            self.adakv.check()
        return result

    def _finish(self, commands: StepCommands) -> Answer:
        """After a step's forward pass: the requests hold what their policies keep."""
        if not commands.compress and not commands.evict:
            return NO_ANSWER
        answer = self.adakv.finish_compressions()
        self._lengths_changed(commands.compress)
        for request_id, compress in commands.compress.items():
            self._hold(request_id, list(compress.slabs))
        answer.failed.extend(self.adakv.finish_evictions())
        self._lengths_changed(commands.evict)
        for request_id, evict in commands.evict.items():
            self._hold(request_id, self._blocks(request_id)[: evict.slabs])
        return _over_ranks(answer, [*commands.compress, *commands.evict])

    def export_request(self, request_id: str, path: str, policy: str) -> list[int] | None:
        """Writes a compressed request's cache to this rank's file, between two steps.

        Returns all its tokens by now, of which the last is not in the cache; None: it is not here,
        or not compressed.

        Raises:
            OSError: there is no room for it.
        """
        tokens = self._tokens(request_id)
        if tokens is None or request_id not in self.adakv:
            return None
        random = self._random_state(request_id)
        kind = self._cache_kind()
        header = kind.header(policy, tokens)
        file = rank_file(path, kind.rank)
        write_state(self.adakv, request_id, random, header, file, self._adakv_files)
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

    def _attach_answer(self, output: Any) -> Any:
        """Attach to a step's output what became of its commands."""
        if not self._adakv_answer.is_empty:
            answer, self._adakv_answer = self._adakv_answer, NO_ANSWER
            if isinstance(output, ModelRunnerOutput):
                attach_answer(output, answer)
            elif output is not None:
                _attach_later(output, answer)
        return output


def _attach_later(output: Any, answer: Answer) -> None:
    """Attach to an asynchronous output's result, once it is there."""
    get_output = output.get_output

    def with_answer() -> ModelRunnerOutput:
        result = get_output()
        attach_answer(result, answer)
        return result

    output.get_output = with_answer


def _over_ranks(answer: Answer, request_ids: list[str]) -> Answer:
    """Return least, most and failures over all tensor-parallel ranks; the mean is each rank's."""
    group = get_tp_group()
    if group.world_size == 1:
        return answer
    mine = [
        [-kept.least, kept.most, request_id in answer.failed]
        for request_id in request_ids
        for kept in (answer.kept.get(request_id, Kept(0.0, 0, 0)),)
    ]
    extremes = torch.tensor(mine)
    torch.distributed.all_reduce(extremes, op=torch.distributed.ReduceOp.MAX, group=group.cpu_group)
    all_ranks = dict(zip(request_ids, extremes.tolist(), strict=True))
    return Answer(
        {
            request_id: Kept(kept.mean, -all_ranks[request_id][0], all_ranks[request_id][1])
            for request_id, kept in answer.kept.items()
        },
        [request_id for request_id, (_, _, failed) in all_ranks.items() if failed],
    )
