"""vLLM's settings: their names, and those that compression and spill add to an engine's."""

import contextlib
import dataclasses
import logging
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError
from vllm.config.kv_events import KVEventsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import (
    FrontendArgs,
    make_arg_parser,
    validate_parsed_serve_args,
)
from vllm.entrypoints.openai.models.protocol import LoRAModulePath
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser

from adakv_serve.serving.vllm_engine.setting_types import check_types
from adakv_worker.config import CompressionConfig
from adakv_worker.frontend.kv_events import EventSockets
from adakv_worker.plugin import engine_args as compression_engine_args

logger = logging.getLogger("ray.serve")

# Settings of vLLM's own socket and of access to it. The front door has both jobs here.
_SOCKET_OPTIONS = {
    "api_key", "api_server_count", "config", "data_parallel_multi_port_external_lb",
    "data_parallel_supervisor_port", "disable_access_log_for_endpoints",
    "disable_uvicorn_access_log", "dp_supervisor_probe_failure_threshold",
    "dp_supervisor_probe_interval_s", "dp_supervisor_probe_timeout_s", "enable_ssl_refresh", "grpc",
    "grpc_port", "h11_max_header_count", "h11_max_incomplete_event_size", "headless", "host",
    "model_tag", "port", "root_path", "ssl_ca_certs", "ssl_cert_reqs", "ssl_certfile",
    "ssl_ciphers", "ssl_keyfile", "uds", "uvicorn_log_level",
}  # fmt: skip


def computes_on_cpus() -> bool:
    """Return whether the installed vLLM is the one for CPUs, with or without a GPU here."""
    return current_platform.is_cpu()


def engine_arg_names() -> set[str]:
    """Return the fields of `AsyncEngineArgs`."""
    return {field.name for field in dataclasses.fields(AsyncEngineArgs)}


def check_engine_types(given: Mapping[str, Any]) -> None:
    """Check fields of `AsyncEngineArgs`, whose names are right, against its types.

    Raises:
        ValueError: one has another type; with its name.
    """
    check_types(given, AsyncEngineArgs, "engine")


def check_server_types(given: Mapping[str, Any]) -> None:
    """Check options of the API, whose names are right, against their types.

    Raises:
        ValueError: one has another type; with its name.
    """
    check_types(given, FrontendArgs, "server")


def server_arg_names() -> set[str]:
    """Return the options of `vllm serve` that shape its API: not the engine's or the socket's."""
    return set(vars(_default_options())) - engine_arg_names() - _SOCKET_OPTIONS


def _default_options() -> Any:
    parser: Any = FlexibleArgumentParser
    return make_arg_parser(parser()).parse_args([])


def with_compression(
    engine_args: dict[str, Any], compression: CompressionConfig | None, movable: bool
) -> dict[str, Any]:
    """Return the engine's arguments with those that compression needs, the operator's first."""
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
        # A request cannot leave while an asynchronous step computes it.
        asynchronous = False if movable else None
    needed = compression_engine_args(
        compression.model_dump(exclude_unset=True), asynchronous=asynchronous
    )
    additional = {**needed.pop("additional_config"), **engine_args.get("additional_config", {})}
    return {**needed, **engine_args, "additional_config": additional}


def with_kv_events(engine_args: dict[str, Any]) -> tuple[dict[str, Any], EventSockets | None]:
    """Return the engine's arguments with KV events typed, and the sockets of the events, if on.

    Unless the operator names endpoints, they are Unix sockets of this replica: ports can be taken.
    """
    given = engine_args.get("kv_events_config")
    if not isinstance(given, dict):
        return engine_args, None
    config = KVEventsConfig(**given)
    engine_args = {**engine_args, "kv_events_config": config}
    if not config.enable_kv_cache_events or config.publisher != "zmq":
        return engine_args, None
    folder = None
    if "endpoint" not in given or config.replay_endpoint is None:
        folder = tempfile.TemporaryDirectory(prefix="adakv-")
        if "endpoint" not in given:
            config.endpoint = f"ipc://{folder.name}/kv-events"
        config.replay_endpoint = config.replay_endpoint or f"ipc://{folder.name}/kv-replay"
    assert config.replay_endpoint is not None
    sockets = EventSockets(_local(config.endpoint), _local(config.replay_endpoint), folder)
    return engine_args, sockets


def _local(endpoint: str) -> str:
    # The publisher may bind to all interfaces; a reader needs an address.
    return endpoint.replace("*", "127.0.0.1")


@contextlib.contextmanager
def refusing_without_values() -> Iterator[None]:
    """Turn vLLM's refusals of settings into ones without values, which may be secret.

    Raises:
        ValueError: vLLM refuses a setting, which the message names.
    """
    try:
        yield
    except ValidationError as error:
        problems = [
            ".".join(map(str, ("engine", *one["loc"]))) + ": " + one["msg"]
            for one in error.errors(include_input=False, include_context=False, include_url=False)
        ]
        raise ValueError("; ".join(problems)) from None


def check_movable(config: Any, compressing: bool) -> None:
    """Raise ValueError, with the setting's name, if the engine's requests cannot move."""
    if not compressing:
        raise ValueError("spill.enabled needs compression, and a backend that compresses")
    if config.scheduler_config.async_scheduling:
        raise ValueError("spill.enabled needs engine.async_scheduling: false")


def server_options(
    model: str, served_name: str, engine_args: AsyncEngineArgs, server_args: dict[str, Any]
) -> Any:
    """Return vLLM's default server options, overlaid by the engine's fields and the operator's."""
    options = _default_options()
    for name, value in {**vars(engine_args), **server_args}.items():
        if hasattr(options, name):
            setattr(options, name, value)
    if options.lora_modules:
        options.lora_modules = [_lora_module(module) for module in options.lora_modules]
    options.model, options.served_model_name = model, [served_name]
    validate_parsed_serve_args(options)
    return options


def _lora_module(given: LoRAModulePath | dict[str, Any]) -> LoRAModulePath:
    """Return an adapter as vLLM wants it; its command line makes this of JSON."""
    try:
        return given if isinstance(given, LoRAModulePath) else LoRAModulePath(**given)
    except TypeError as error:
        raise ValueError(f"server.lora_modules: {error}") from None
