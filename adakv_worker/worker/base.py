"""The parts of our workers and model runners that all platforms share."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.core.sched.output import GrammarOutput, SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
from vllm.v1.worker.worker_base import WorkerBase

from adakv_serve.kernels.paging.paged_cache import Conversion, PagedCache
from adakv_serve.kernels.paging.pages import PageTables
from adakv_worker.attention.folded import Pages
from adakv_worker.attention.folding import FoldingBuilder
from adakv_worker.byte_budgets import settings_of
from adakv_worker.config import CompressionConfig
from adakv_worker.spec import AdaKVSpec
from adakv_worker.worker.fingerprint import fingerprint
from adakv_worker.worker.held_moves import HeldMoves
from adakv_worker.worker.model_parts import layer_parts
from adakv_worker.worker.moves import CacheKind, Moves
from adakv_worker.worker.ranks import Ranks
from adakv_worker.worker.requests import CompressionState
from adakv_worker.worker.step import Batch, StepWork
from adakv_worker.worker.supported_policies import unsupported_presets
from adakv_worker.worker.timings import Timings, wall_clock
from adakv_worker.worker.warm_up import warm_up


class KVMemory(NamedTuple):
    """An engine's KV memory: pages as its kernels see them, and in logical order, and their tables.

    blocks: pages of whole prompts. slabs: the same memory as pages of compressed ones.
    conversion: from entries of blocks to those of slabs; None where both store numbers alike.
    graph_queries: memory [L, rows, Hq, D] for the queries of full CUDA graphs; None without.
    """

    pages: Pages
    blocks: PagedCache
    slabs: PagedCache
    tables: PageTables
    conversion: Conversion | None = None
    graph_queries: Tensor | None = None


class AdaKVRunner:
    """Mixin placed before a vLLM runner, which gives its batch and its memory to a `StepWork`.

    A platform's mixin implements `_kv_memory`. A version's mixin implements `_make_batch` and has
    vLLM's methods call the step work.
    """

    # vLLM's own attributes.
    vllm_config: VllmConfig
    model_config: Any
    kv_cache_config: KVCacheConfig
    kv_cache_dtype: Any
    kv_caches: Any
    attn_groups: Any
    get_model: Any

    adakv: StepWork

    def _kv_memory(self, config: CompressionConfig, layers: list[Any]) -> KVMemory:
        """Return the memory of attention layers, which are in the order of their caches."""
        raise NotImplementedError

    def _most_rows(self, config: CompressionConfig) -> int:
        """Return the most compressed caches at once, of requests and held ones."""
        # One more: a request may copy a held cache that goes in the same step.
        copy = 1 if config.most_held else 0
        return int(self.vllm_config.scheduler_config.max_num_seqs) + config.most_held + copy

    def _make_batch(self) -> Batch:
        """Return this runner's requests."""
        raise NotImplementedError

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        stock: Any = super()
        # The backend reads from this configuration whether compression is on.
        with set_current_vllm_config(self.vllm_config):
            specs: dict[str, KVCacheSpec] = stock.get_kv_cache_spec()
        if all(isinstance(spec, AdaKVSpec) for spec in specs.values()) and specs:
            unsupported = unsupported_presets(layer_parts(self.get_model(), list(specs)))
            return {
                name: replace(spec, unsupported=tuple(unsupported.items()))  # type: ignore[call-arg]
                for name, spec in specs.items()
            }
        return specs

    def initialize_kv_cache(self, kv_cache_config: KVCacheConfig, *args: Any, **kw: Any) -> None:
        stock: Any = super()
        # vLLM may have tried CUDA graphs: free the trial's memory before taking the real one.
        vars(self).pop("adakv", None)
        with set_current_vllm_config(self.vllm_config):
            stock.initialize_kv_cache(kv_cache_config, *args, **kw)
        config = settings_of(self.vllm_config)
        if config is not None and self.kv_caches:
            self.adakv = self._make_step_work(config)

    def _make_step_work(self, config: CompressionConfig) -> StepWork:
        builders = self._builders()
        layers = self._layers()
        memory = self._kv_memory(config, layers)
        names, page_dtype = [layer.layer_name for layer in layers], memory.pages.kv_cache_dtype
        parts = layer_parts(self.get_model(), names, page_dtype)
        state = CompressionState(
            memory.slabs, memory.tables, parts, blocks=memory.blocks,
            conversion=memory.conversion,
            record_selections=config.record_selections,
        )  # fmt: skip
        batch, ranks = self._make_batch(), Ranks.of_this_engine()
        kind = self._cache_kind(state, ranks)
        moves = Moves(state, batch, kind)
        held = HeldMoves(state.held, kind, config, self._unsupported(), moves.files)
        return StepWork(
            state, memory.pages, builders, batch, moves, held, ranks,
            graph_queries=memory.graph_queries, check_invariants=config.check_invariants,
        )  # fmt: skip

    def _builders(self) -> list[FoldingBuilder]:
        """Return the metadata builders.

        Raises:
            ValueError: a layer has a backend that does not fold compressed requests.
        """
        builders = []
        for group in self.attn_groups[0]:
            builder = group.get_metadata_builder()
            if not isinstance(builder, FoldingBuilder):
                raise ValueError(
                    f"adakv: compression does not work with {group.backend.get_name()}: set "
                    "attention_backend to FLASH_ATTN or TRITON_ATTN"
                )
            builders.append(builder)
        return builders

    def _layers(self) -> list[Any]:
        """Return the attention layers in the order of their caches, and number them so."""
        (group,) = self.kv_cache_config.kv_cache_groups
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [context[name] for name in group.layer_names]
        layers.sort(key=lambda layer: layer.kv_cache.data_ptr())
        for index, layer in enumerate(layers):
            layer.adakv_index = index
        return layers

    def _cache_kind(self, state: CompressionState, ranks: Ranks) -> CacheKind:
        layers, heads, page_tokens, entry_size = state.cache_shape
        return CacheKind(
            model=self.model_config.model,
            fingerprint=fingerprint(self.vllm_config),
            dtype=_name(state.dtype),
            query_dtype=_name(self.model_config.dtype),
            page_tokens=page_tokens,
            layers=layers,
            heads=heads,
            head_dim=state.head_size,
            entry_size=entry_size,
            rank=ranks.rank,
            ranks=ranks.size,
            packing=state.packing,
        )

    def warm_up_compression(self) -> None:
        """Compile the kernels of compression; call before the first request takes a block."""
        config = settings_of(self.vllm_config)
        assert config is not None
        blocks = self.kv_cache_config.num_blocks
        warm_up(self.adakv.state, config, blocks, self._unsupported())

    def _unsupported(self) -> dict[str, str]:
        """Return the presets that the model does not support, with the reason."""
        return dict(self._spec().unsupported)

    def _spec(self) -> AdaKVSpec:
        (group,) = self.kv_cache_config.kv_cache_groups
        assert isinstance(group.kv_cache_spec, AdaKVSpec)
        return group.kv_cache_spec

    @torch.inference_mode()
    def execute_model(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        # Model Runner V2 also warms up by this method.
        if kwargs.get("dummy_run"):
            return stock.execute_model(scheduler_output, *args, **kwargs)
        return self.adakv.run(
            scheduler_output, lambda: stock.execute_model(scheduler_output, *args, **kwargs)
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class AdaKVWorkerMixin(WorkerBase):
    """Mixin placed before a platform's worker; its `adakv_` methods are for `collective_rpc`.

    Those run between two steps, in inference mode as steps do: page tables are brought up to date
    when they are read. Timings work on a stock model runner as well, so that an engine
    without compression can be measured by the same worker class.
    """

    model_runner: Any
    _timings: Timings | None = None

    def get_supported_kv_cache_layouts(self) -> list[str]:
        # The backend reads from this configuration whether compression is on.
        with set_current_vllm_config(self.vllm_config):
            return super().get_supported_kv_cache_layouts()

    def execute_model(self, scheduler_output: SchedulerOutput) -> Any:
        with self._timed(lambda timings: timings.step(scheduler_output)):
            return super().execute_model(scheduler_output)

    def sample_tokens(self, grammar_output: GrammarOutput | None) -> Any:
        with self._timed(lambda timings: timings.sampling()):
            return super().sample_tokens(grammar_output)  # type: ignore[arg-type]

    def adakv_cache_kind(self) -> str:
        return self._work.moves.kind.name

    @torch.inference_mode()
    def adakv_export(self, request_id: str, path: str, policy: str) -> list[int] | None:
        return self._work.moves.export(request_id, path, policy)

    @torch.inference_mode()
    def adakv_stage(self, name: str, path: str, policy: str, token_ids: list[int]) -> str | None:
        return self._work.moves.stage(name, path, policy, token_ids)

    def adakv_unstage(self, name: str) -> None:
        self._work.moves.unstage(name)

    @torch.inference_mode()
    def adakv_find_held(self, *request: Any) -> list[Any] | None:
        return self._work.held_moves.find(*request)

    @torch.inference_mode()
    def adakv_export_held_for(self, *request: Any) -> list[Any] | None:
        return self._work.held_moves.export_for(*request)

    @torch.inference_mode()
    def adakv_list_held(self) -> list[list[Any]]:
        return self._work.held_moves.list()

    @torch.inference_mode()
    def adakv_export_held(self, name: str, path: str) -> dict[str, Any] | None:
        return self._work.held_moves.export(name, path)

    @torch.inference_mode()
    def adakv_arrive(self, name: str, path: str, card: dict[str, Any]) -> str | None:
        return self._work.held_moves.arrive(name, path, card)

    @torch.inference_mode()
    def adakv_forget_held(self, name: str) -> None:
        self._work.held_moves.forget(name)

    def adakv_start_timings(self) -> None:
        """Record timings from the next step on, and forget those recorded before."""
        work = self._work if isinstance(self.model_runner, AdaKVRunner) else None
        self._timings = Timings(lambda: work.extra_bytes if work else 0, wall_clock)
        if work:
            work.timings = self._timings

    def adakv_timings(self) -> dict[str, object]:
        """Stop recording and return the figures: see `Timings.figures`."""
        assert self._timings is not None, "adakv_start_timings comes first"
        timings, self._timings = self._timings, None
        if isinstance(self.model_runner, AdaKVRunner):
            self._work.timings = None
        return timings.figures()

    def _timed(
        self, measure: Callable[[Timings], AbstractContextManager[None]]
    ) -> AbstractContextManager[None]:
        return nullcontext() if self._timings is None else measure(self._timings)

    @property
    def _work(self) -> StepWork:
        assert isinstance(self.model_runner, AdaKVRunner)
        return self.model_runner.adakv
