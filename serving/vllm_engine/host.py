"""vLLM inside a replica: an `AsyncLLM` and vLLM's own FastAPI app around it."""

import asyncio
import os
from collections.abc import AsyncGenerator, Callable
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.utils.system_utils import kill_process_tree
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

from adakv_serve.serving.http.api_keys import VLLM_VARIABLE
from adakv_serve.serving.http.asgi import ASGIApp
from adakv_serve.serving.http.compression_proof import ProofMiddleware
from adakv_serve.serving.vllm_engine.decoded import count_decoded
from adakv_serve.serving.vllm_engine.hang_watch import HangWatch
from adakv_serve.serving.vllm_engine.http_metrics import HttpMetrics
from adakv_serve.serving.vllm_engine.load import CacheSize, EngineLoad, LoadStats
from adakv_serve.serving.vllm_engine.options import (
    check_movable,
    computes_on_cpus,
    refusing_without_values,
    server_options,
    with_compression,
    with_kv_events,
)
from adakv_serve.serving.vllm_engine.proofs import take_proofs
from adakv_serve.serving.vllm_engine.surface import mend_surface
from adakv_serve.serving.vllm_engine.tenants import TenantMiddleware
from adakv_worker.compiled_products import bound_compiled_products
from adakv_worker.config import CompressionConfig, compression_config
from adakv_worker.frontend.kv_events import CacheChange, EventSockets, cache_changes
from adakv_worker.frontend.moving import MovableLLM, MovingCore
from adakv_worker.frontend.sent_requests import BookedLLM
from adakv_worker.frontend.session_moves import SessionCore
from adakv_worker.messages import Proof
from adakv_worker.refusals import refuse_unsupported, refused_here
from adakv_worker.stored_dtypes import entry_bytes

# As long as vLLM itself waits for a step of several workers: a prefill on a slow CPU takes minutes.
DEFAULT_HANG_S = 300.0


class _Server:
    """Stand-in for the uvicorn server that vLLM's dead-engine handler stops."""

    should_exit = False


class VllmHost:
    """One engine and its app. Build it inside a running event loop."""

    def __init__(
        self,
        engine: BookedLLM,
        app: ASGIApp,
        stats: LoadStats,
        kv_events: EventSockets | None = None,
        hang_s: float = DEFAULT_HANG_S,
        cache_kind: str = "",
    ) -> None:
        """
        Args:
            cache_kind: name of the kind of caches that a movable engine can read.
        """
        self.engine = engine
        self.app = app
        self.cache_kind = cache_kind
        self._stats = stats
        self._kv_events = kv_events
        self._watch = HangWatch(engine.is_paused, self._end_processes, hang_s)
        self._watch.start()

    @classmethod
    async def start(
        cls,
        model: str,
        served_name: str,
        engine_args: dict[str, Any],
        server_args: dict[str, Any],
        compression: CompressionConfig | None = None,
        on_proof: Callable[[Proof], None] = lambda proof: None,
        *,
        movable: bool = False,
        hang_s: float = DEFAULT_HANG_S,
    ) -> "VllmHost":
        """Start the engine (about 25 s on CPU) and assemble the app.

        Args:
            on_proof: called with the proof of every request once its prompt is complete. (Not with
                LoRA, which uses the same field of the statistics.)
            movable: whether compressed requests can leave and enter the engine.
            hang_s: time without a step or an answer after which the engine is ended.

        Raises:
            ValueError: vLLM refuses the configuration.
        """
        with refusing_without_values():
            settings, events = with_kv_events(with_compression(engine_args, compression, movable))
            args = AsyncEngineArgs(model=model, served_model_name=[served_name], **settings)
            config = args.create_engine_config()
        bound_sequences(config.scheduler_config.max_num_seqs)
        compressing = _check(config, movable)
        stats = LoadStats(on_proof)
        engine = (MovableLLM if movable else BookedLLM).from_vllm_config(
            config,
            stat_loggers=[RayPrometheusStatLogger, stats.logger],
            enable_log_requests=args.enable_log_requests,
        )
        assert isinstance(engine, BookedLLM)
        stats.sent = engine.sent
        app = await _app(engine, server_options(model, served_name, args, server_args))
        count_decoded(engine)
        if compressing:
            take_proofs(engine)
            app = ProofMiddleware(app)
        kind = await engine.engine_core.cache_kind() if movable else ""
        return cls(engine, TenantMiddleware(app), stats, events, hang_s, kind)

    @property
    def core(self) -> MovingCore:
        """The part of an engine with movable requests through which they leave and enter."""
        assert isinstance(self.engine.engine_core, MovingCore)
        return self.engine.engine_core

    @property
    def sessions(self) -> SessionCore:
        """The held caches of an engine with movable requests."""
        return SessionCore(self.core)

    @property
    def max_running(self) -> int:
        """Most requests that the scheduler runs at once."""
        return self.engine.vllm_config.scheduler_config.max_num_seqs

    @property
    def block_bytes(self) -> int:
        """Bytes of one KV block: all layers, on all tensor-parallel ranks."""
        config = self.engine.vllm_config
        model = config.model_config
        heads = model.get_num_layers(config.parallel_config) * model.get_total_num_kv_heads()
        entry = entry_bytes(model, config.cache_config.cache_dtype)
        return heads * entry * config.cache_config.block_size

    @property
    def dead(self) -> bool:
        """Whether the engine process is gone."""
        return self.engine.errored

    @property
    def silent(self) -> bool:
        """Whether the engine is dead or has not answered for long, so that its load is old."""
        return self.dead or self._watch.silent

    def check(self) -> None:
        """Raise RuntimeError if the engine process is gone or hung.

        Serve's controller unpickles what a health check raises. For an exception of vLLM it would
        import vLLM, and do nothing else for seconds.
        """
        if self.dead:
            raise RuntimeError("the engine process has died")
        self._watch.check()

    def _end_processes(self) -> None:
        """Kill the engine's processes; vLLM notices, and its requests fail."""
        for process in self.engine.engine_core.resources.engine_manager.processes:
            if process.is_alive():
                kill_process_tree(process.pid)

    def load(self) -> EngineLoad:
        """Return the engine's present load."""
        cache = self.engine.vllm_config.cache_config
        return self._stats.load(CacheSize((cache.num_gpu_blocks or 1) - 1, cache.block_size))

    @property
    def changed(self) -> asyncio.Event:
        """Event of a changed load; the reader clears it."""
        return self._stats.changed

    def cache_changes(self) -> AsyncGenerator[CacheChange, None] | None:
        """Follow the changes of the prefix cache; None if KV events are off."""
        return None if self._kv_events is None else cache_changes(self._kv_events)

    def shutdown(self) -> None:
        self._watch.stop()
        self.engine.shutdown()
        if self._kv_events is not None:
            self._kv_events.remove()


def _check(config: VllmConfig, movable: bool) -> bool:
    """Return whether the engine compresses; raise ValueError for settings that exclude it."""
    compressing = compression_config(config.additional_config) is not None
    if compressing:
        refuse_unsupported(config)
        refuse_unsupported(config, refused_here())
    if movable:
        check_movable(config, compressing)
    return compressing


async def _app(engine: BookedLLM, options: Any) -> ASGIApp:
    """Return vLLM's app around the engine, with the corrections of `surface`."""
    # The front door checks this key and removes it from requests, so the app must not ask for it.
    os.environ.pop(VLLM_VARIABLE, None)
    tasks = await engine.get_supported_tasks()
    app = build_app(options, tasks, engine.model_config)
    await init_app_state(engine, app.state, options, tasks)
    app.state.server = _Server()
    mend_surface(app, HttpMetrics().note)
    return app


def bound_sequences(most: int) -> None:
    """Have vLLM refuse requests for more answers, or of more prompts, than it computes at once.

    By default it takes 16,384 answers, which wait in front of all later requests. Variables that
    the operator has set keep their values.
    """
    for name in ("VLLM_MAX_N_SEQUENCES", "VLLM_MAX_COMPLETION_PROMPTS"):
        os.environ.setdefault(name, str(most))


def set_up_cpu(threads: int, tensor_parallel_size: int) -> None:
    """Set this process up for CPU engines of `threads` threads; do nothing with vLLM for GPUs.

    Variables that the operator has set keep their values.
    """
    if not computes_on_cpus():
        return
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    # An engine that compresses does so itself.
    bound_compiled_products()
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if tensor_parallel_size == 1:
        # Run a single worker inside the engine's process. vLLM would give it a process of its own
        # to bind threads, and both would spin on their queue and take a core each.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
