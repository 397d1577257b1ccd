"""vLLM inside a replica: an `AsyncLLM` and vLLM's own FastAPI app around it.

The one file of this package that knows vLLM's entry points.
"""

import asyncio
import dataclasses
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from http import HTTPStatus
from typing import Any, NamedTuple

import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import Response
from vllm.config.kv_events import KVEventsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.api_server.app_state import init_app_state
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.metrics.loggers import StatLoggerBase
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats

from adakv_worker.config import CompressionConfig, compression_config
from adakv_worker.kv_events import CacheChange, cache_changes
from adakv_worker.moving_core import MovableLLM, MovingCore
from adakv_worker.plugin import engine_args as compression_engine_args
from adakv_worker.stats import MemoryStats, proofs_of
from adakv_worker.support import refuse_unsupported
from kernels.blocks import blocks_for_tokens
from serving.asgi import ASGIApp
from serving.compression_proof import ProofMiddleware, noting
from serving.openai_error import error_body

logger = logging.getLogger("ray.serve")

_RATE_WINDOW_S = 5.0
# Settings of the socket that vLLM would listen on, and of access, which the front door guards.
_SOCKET_OPTIONS = {
    "api_key", "api_server_count", "config", "data_parallel_multi_port_external_lb",
    "data_parallel_supervisor_port", "disable_access_log_for_endpoints",
    "disable_uvicorn_access_log", "dp_supervisor_probe_failure_threshold",
    "dp_supervisor_probe_interval_s", "dp_supervisor_probe_timeout_s", "enable_ssl_refresh", "grpc",
    "grpc_port", "h11_max_header_count", "h11_max_incomplete_event_size", "headless", "host",
    "model_tag", "port", "root_path", "ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile",
    "ssl_ciphers", "ssl_keyfile", "uds", "uvicorn_log_level",
}  # fmt: skip


class EngineLoad(NamedTuple):
    """What an engine tells about its KV memory. Blocks exclude vLLM's null block.

    told_at: when it did, by the monotonic clock.
    """

    block_size_tokens: int
    blocks_total: int
    blocks_free: int
    blocks_evictable: int | None
    blocks_compressed: int
    blocks_uncompressed: int
    blocks_reserved_growth: int
    running: int
    waiting: int
    waiting_blocks: int | None
    prefill_tokens_queued: int
    decode_tokens_per_s: float
    achieved_compression: float
    preemptions: int
    recomputed_tokens: int | None = None
    decode_evictions: int | None = None
    blocks_lent: int = 0
    blocks_borrowed: int = 0
    told_at: float = float("inf")


class _Server:
    """Stands in for the uvicorn server that vLLM's dead-engine handler asks to exit."""

    should_exit = False


class VllmHost:
    """Owns one engine and its app. Build it inside a running event loop."""

    def __init__(
        self,
        engine: AsyncLLM,
        app: ASGIApp,
        stats: "_LoadStats",
        kv_events_endpoint: str | None = None,
    ) -> None:
        self.engine = engine
        self.app = app
        self._stats = stats
        self._kv_events_endpoint = kv_events_endpoint

    @classmethod
    async def start(
        cls,
        model: str,
        served_name: str,
        engine_args: dict[str, Any],
        server_args: dict[str, Any],
        compression: CompressionConfig | None = None,
        on_proof: Callable[[dict[str, Any]], None] = lambda proof: None,
        *,
        movable: bool = False,
    ) -> "VllmHost":
        """Starts the engine (about 25 s on CPU) and assembles the app.

        Args:
            on_proof: called with the compression proof of every request once its prompt is
                complete. (Not with LoRA, whose statistics leave it no room.)
            movable: whether compressed requests can leave it and come to it.

        Raises:
            ValueError: vLLM refuses the configuration.
        """
        settings = _with_compression(engine_args, compression, movable)
        settings, endpoint = _with_kv_events(settings)
        args = AsyncEngineArgs(model=model, served_model_name=[served_name], **settings)
        config = args.create_engine_config()
        compressing = compression_config(config.additional_config) is not None
        if compressing:
            refuse_unsupported(config)
        if movable:
            _check_movable(config, compressing)
        stats = _LoadStats(on_proof)
        engine = (MovableLLM if movable else AsyncLLM).from_vllm_config(
            config,
            stat_loggers=[RayPrometheusStatLogger, stats.logger],
            enable_log_requests=args.enable_log_requests,
        )
        tasks = await engine.get_supported_tasks()
        options = _server_options(model, served_name, args, server_args)
        app = build_app(options, tasks, engine.model_config)
        await init_app_state(engine, app.state, options, tasks)
        app.state.server = _Server()
        _mend_openai_surface(app)
        if not compressing:
            return cls(engine, app, stats, endpoint)
        engine.generate = noting(engine.generate)  # type: ignore[method-assign]
        return cls(engine, ProofMiddleware(app), stats, endpoint)

    @property
    def core(self) -> MovingCore:
        """Where requests leave and come in, of an engine whose requests are movable."""
        assert isinstance(self.engine.engine_core, MovingCore)
        return self.engine.engine_core

    @property
    def max_running(self) -> int:
        """Requests that its scheduler lets run at once."""
        return self.engine.vllm_config.scheduler_config.max_num_seqs

    @property
    def block_bytes(self) -> int:
        """Of one KV block, all layers, on all tensor-parallel ranks."""
        config = self.engine.vllm_config
        model = config.model_config
        assert isinstance(model.dtype, torch.dtype)
        entry = model.get_total_num_kv_heads() * model.get_head_size() * model.dtype.itemsize
        layers = model.get_num_layers(config.parallel_config)
        return 2 * layers * entry * config.cache_config.block_size

    @property
    def dead(self) -> bool:
        return self.engine.errored

    async def check(self) -> None:
        """Raises vLLM's EngineDeadError when the engine process is gone."""
        await self.engine.check_health()

    def load(self) -> EngineLoad:
        return self._stats.load(self.engine)

    @property
    def changed(self) -> asyncio.Event:
        """Set when the load has changed; the reader clears it."""
        return self._stats.changed

    def cache_changes(self) -> AsyncIterator[CacheChange] | None:
        """What the prefix cache gains and loses from now on; None where KV events are off."""
        if self._kv_events_endpoint is None:
            return None
        return cache_changes(self._kv_events_endpoint)

    def shutdown(self) -> None:
        self.engine.shutdown()


class _LoadStats:
    """Keeps the newest scheduler statistics; `logger` is the factory that vLLM calls."""

    def __init__(self, on_proof: Callable[[dict[str, Any]], None]) -> None:
        self._on_proof = on_proof
        self.changed = asyncio.Event()
        self.latest = SchedulerStats()
        self.preemptions = 0
        self._decode_evictions = 0
        self._told_at = float("-inf")
        self._tokens: list[tuple[float, int]] = []

    def logger(self, vllm_config: Any, engine_index: int = 0) -> StatLoggerBase:
        return _LoadLogger(self)

    def note(self, scheduler_stats: SchedulerStats, generated_tokens: int) -> None:
        now = time.monotonic()
        self.latest = scheduler_stats
        self._told_at = now
        for proof in proofs_of(scheduler_stats):
            self._on_proof(proof)
        if (memory := MemoryStats.of(scheduler_stats)) is not None:
            self._decode_evictions += memory.decode_evictions
        self._tokens.append((now, generated_tokens))
        while self._tokens and now - self._tokens[0][0] > _RATE_WINDOW_S:
            self._tokens.pop(0)
        self.changed.set()

    def load(self, engine: AsyncLLM) -> EngineLoad:
        cache = engine.vllm_config.cache_config
        total = (cache.num_gpu_blocks or 1) - 1
        core = engine.engine_core
        moving = core if isinstance(core, MovingCore) else None
        requests = {
            name: state
            for name, state in engine.output_processor.request_states.items()
            if moving is None or not moving.is_away(name)
        }
        guests = moving.guests if moving is not None else 0
        # An abort frees blocks without a step to report it: with no request left, nothing is held.
        stats = self.latest if requests or guests else SchedulerStats()
        waiting = stats.num_waiting_reqs + stats.num_skipped_waiting_reqs
        unstarted = [state.prompt_len or 0 for state in requests.values() if state.is_prefilling]
        # Stock vLLM tells less; its waiting prompts are what they take.
        memory = MemoryStats.of(stats)
        waiting_blocks = _waiting_blocks(unstarted, waiting, cache.block_size)
        if memory:
            waiting_blocks = memory.waiting_blocks
        # A step with a long prefill takes seconds, and what has come since is in no statistics yet.
        unseen = max(0, len(requests) + guests - stats.num_running_reqs - waiting)
        # A guest comes with its cache, and has nothing to prefill.
        unseen = min(unseen, len(requests))
        newest = [state.prompt_len or 0 for state in requests.values()][len(requests) - unseen :]
        prompts = [blocks_for_tokens(length, cache.block_size) for length in newest]
        # An engine that was idle has begun the first of them.
        begun = 1 if unseen and stats.num_running_reqs + waiting == 0 else 0
        if waiting_blocks is not None:
            waiting_blocks += sum(prompts[begun:])
        free = max(0, round((1 - stats.kv_cache_usage) * total) - sum(prompts[:begun]))
        compressed = memory.compressed_blocks if memory else 0
        # What is free once the last request has ended is evictable still.
        cached = MemoryStats.of(self.latest)
        since = time.monotonic() - _RATE_WINDOW_S
        recent = sum(count for at, count in self._tokens if at > since)
        return EngineLoad(
            block_size_tokens=cache.block_size,
            blocks_total=total,
            blocks_free=free,
            blocks_evictable=min(cached.evictable_blocks, free) if cached else None,
            blocks_compressed=compressed,
            blocks_uncompressed=max(0, total - free - compressed),
            blocks_reserved_growth=memory.growth_blocks if memory else 0,
            running=stats.num_running_reqs + begun,
            waiting=waiting + unseen - begun,
            waiting_blocks=waiting_blocks,
            prefill_tokens_queued=(
                memory.queued_prefill_tokens + sum(newest) if memory else sum(unstarted)
            ),
            decode_tokens_per_s=recent / _RATE_WINDOW_S,
            achieved_compression=(
                memory.kept_tokens / memory.original_tokens
                if memory and memory.original_tokens
                else 1.0
            ),
            preemptions=self.preemptions,
            # Of the engine's whole life, so not forgotten with its last request.
            recomputed_tokens=cached.recomputed_tokens if cached else None,
            decode_evictions=self._decode_evictions if cached else None,
            told_at=self._told_at,
        )


class _LoadLogger(StatLoggerBase):
    def __init__(self, stats: _LoadStats) -> None:
        self._stats = stats

    def record(self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any) -> None:
        # Those of a request that is away come without the engine's own statistics.
        self._stats.preemptions += iteration_stats.num_preempted_reqs if iteration_stats else 0
        if scheduler_stats is not None:
            generated = iteration_stats.num_generation_tokens if iteration_stats else 0
            self._stats.note(scheduler_stats, generated)

    def log_engine_initialized(self) -> None:
        pass


def _check_movable(config: Any, compressing: bool) -> None:
    """Raises ValueError where requests cannot move, naming the setting."""
    if not compressing:
        raise ValueError("spill.enabled needs compression, and a backend that compresses")
    if config.scheduler_config.async_scheduling:
        raise ValueError("spill.enabled needs engine.async_scheduling: false")


def _waiting_blocks(prompt_lens: list[int], waiting: int, block_size: int) -> int | None:
    """Blocks that the waiting prompts need, when they can be told apart from those in prefill."""
    if waiting == 0:
        return 0
    if len(prompt_lens) != waiting:
        return None
    return sum(blocks_for_tokens(length, block_size) for length in prompt_lens)


def _with_compression(
    engine_args: dict[str, Any], compression: CompressionConfig | None, movable: bool
) -> dict[str, Any]:
    """The engine's arguments with those that compression needs; what the operator set stays."""
    if compression is None or not compression.enabled:
        return engine_args
    if not (current_platform.is_cpu() or current_platform.is_cuda()):
        logger.warning(
            "compression is configured but NOT running: it has backends for CPUs and CUDA only"
        )
        return engine_args
    asynchronous = engine_args.get("async_scheduling")
    if asynchronous is None:
        engine_args = {k: v for k, v in engine_args.items() if k != "async_scheduling"}
        # Of a step that is on its way a request cannot leave.
        asynchronous = False if movable else None
    needed = compression_engine_args(
        compression.model_dump(exclude_unset=True), asynchronous=asynchronous
    )
    additional = {**needed.pop("additional_config"), **engine_args.get("additional_config", {})}
    return {**needed, **engine_args, "additional_config": additional}


def _with_kv_events(engine_args: dict[str, Any]) -> tuple[dict[str, Any], str | None]:
    """The engine's arguments with its KV events typed, and where to listen to them if they are on.

    Without an endpoint of the operator's it is a socket of this replica alone: a port can be taken.
    """
    given = engine_args.get("kv_events_config")
    if not isinstance(given, dict):
        return engine_args, None
    config = KVEventsConfig(**given)
    if not config.enable_kv_cache_events or config.publisher != "zmq":
        return {**engine_args, "kv_events_config": config}, None
    if "endpoint" not in given:
        config.endpoint = f"ipc://{tempfile.mkdtemp(prefix='adakv-')}/kv-events"
    # What the publisher binds to all interfaces is reached by this one.
    return {**engine_args, "kv_events_config": config}, config.endpoint.replace("*", "127.0.0.1")


def engine_arg_names() -> set[str]:
    return {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def server_arg_names() -> set[str]:
    """Options of `vllm serve` that shape its API: not the engine's, not its socket's."""
    return set(vars(_default_options())) - engine_arg_names() - _SOCKET_OPTIONS


def _default_options() -> Any:
    return make_arg_parser(FlexibleArgumentParser()).parse_args([])


def _server_options(
    model: str, served_name: str, engine_args: AsyncEngineArgs, server_args: dict[str, Any]
) -> Any:
    """vLLM's server options at their defaults, with the engine's fields and ours laid over them."""
    options = _default_options()
    for name, value in {**vars(engine_args), **server_args}.items():
        if hasattr(options, name):
            setattr(options, name, value)
    options.model, options.served_model_name = model, [served_name]
    validate_parsed_serve_args(options)
    return options


def _mend_openai_surface(app: FastAPI) -> None:
    async def http_error(_: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        body = error_body(
            error.status_code, str(error.detail), type_=HTTPStatus(error.status_code).phrase
        )
        return Response(body, error.status_code, error.headers, media_type="application/json")

    async def show_model(model_id: str, request: Request) -> Response:
        models = await request.app.state.openai_serving_models.show_available_models()
        for card in models.data:
            if card.id == model_id:
                return JSONResponse(card.model_dump())
        body = error_body(
            404, f"The model `{model_id}` does not exist.", type_="NotFoundError", param="model"
        )
        return Response(body, 404, media_type="application/json")

    app.add_exception_handler(StarletteHTTPException, http_error)
    app.add_api_route("/v1/models/{model_id:path}", show_model, methods=["GET"])
    # vLLM has built the stack already, with the handlers of that moment.
    app.middleware_stack = app.build_middleware_stack()


def set_up_cpu(threads: int, tensor_parallel_size: int) -> None:
    """Prepares this process for CPU engines of `threads` threads; call it before torch loads.

    What the operator has set in the environment stays.
    """
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if tensor_parallel_size == 1:
        # A single worker then runs inside the engine's process. In one of its own, vLLM's choice
        # for binding threads, both processes spin on their queue and take a core each.
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
