"""The application builder that `configs/*.yaml` name: `adakv_serve.serving.app:build`."""

import os
from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig, RequestRouterConfig

from adakv_serve.router.ledger.store_client import refuse_unfit_store
from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.config_sections import AuthConfig, IngressConfig, KeyLimitsConfig
from adakv_serve.serving.engine import Engine
from adakv_serve.serving.http.api_keys import digests_of
from adakv_serve.serving.http.door_settings import FrontDoorSettings
from adakv_serve.serving.http.edge import MOST_BODY_BYTES_VARIABLE
from adakv_serve.serving.http.key_limits import Limits
from adakv_serve.serving.ingress.deployment import Ingress

# The ingress forwards chunks and never blocks. Passing each chunk between Serve's three event loops
# would cost more than the work itself.
_ONE_LOOP = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}

# Deployments call each other by gRPC, which takes no message of over 4 MiB by itself. Bodies and
# answers have limits of their own.
_MESSAGES = {"RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str((1 << 31) - 1)}

# Request routers by `routing.policy`, without Serve's default.
_ROUTERS = {
    "occupancy": "adakv_serve.serving.ingress.served_router:ServedRouter",
    "prefix_aware": "adakv_serve.serving.ingress.prefix_aware:PrefixAwareRouter",
}

# Time that an ingress outlives the engines, to tell clients of streams that were cut.
_LAST_EVENTS_S = 10.0
# Share of its limit that an ingress is to have when their number follows the load.
_INGRESS_FILL = 0.5
# Every request is in an ingress' queue for a moment. What finds it full is refused at once; without
# a limit it would wait for a place without an answer.
_INGRESS_QUEUE = 64


def build(config: AppConfig) -> Application:
    """Build `Ingress -> Engine` from the YAML's `args`.

    Raises:
        ValueError: the configuration asks for what is not there, as `api_keys` describes, or its
            store is not a single server.
    """
    if config.store.url is not None:
        refuse_unfit_store(config.store.url.get_secret_value())
    lenders = None
    if (lending := config.for_lenders()) is not None:
        lenders = serve.deployment(name="Lender", **engine_options(lending))(Engine).bind(
            _of_engines(lending)
        )
    deployment = serve.deployment(name="Engine", **engine_options(config))
    engine = deployment(Engine).bind(_of_engines(config), lenders)
    ingress = serve.deployment(name="Ingress", **ingress_options(config))
    settings = FrontDoorSettings(
        key_digests=digests_of(api_keys(config)),
        keys_file=config.auth.keys_file,
        shares_caches=config.auth.shares_caches,
        limits=_limits(config.auth.limits),
        limits_by_key=tuple(
            (name, _limits(limits)) for name, limits in config.auth.limits_by_key.items()
        ),
        places=config.places,
        more_paths=tuple(config.ingress.more_paths),
        max_body_bytes=config.ingress.max_body_bytes,
        max_held_body_bytes=config.ingress.max_held_body_bytes,
        body_timeout_s=config.ingress.body_timeout_s,
        retry_after_s=config.ingress.retry_after_s,
        request_deadline_s=config.ingress.request_deadline_s,
        health_timeout_s=config.ingress.health_timeout_s,
    )
    return ingress(Ingress).bind(engine, settings, config)


def _limits(limits: KeyLimitsConfig) -> Limits:
    return Limits(**limits.model_dump())


def _of_engines(config: AppConfig) -> AppConfig:
    """Return the configuration without the sections that only ingresses read."""
    return config.model_copy(update={"ingress": IngressConfig(), "auth": AuthConfig()})


def ingress_options(config: AppConfig) -> dict[str, Any]:
    """Return the Serve options of the `Ingress` deployment: scale and limits."""
    limit, ingress = config.ingress_max_ongoing_requests, config.ingress
    scale: dict[str, Any] = {"num_replicas": ingress.count}
    if ingress.max_count is not None:
        scale = {
            "autoscaling_config": {
                "min_replicas": ingress.count,
                "max_replicas": ingress.max_count,
                "target_ongoing_requests": _INGRESS_FILL * limit,
            }
        }
    variables = {**_ONE_LOOP, **_MESSAGES, MOST_BODY_BYTES_VARIABLE: str(ingress.max_body_bytes)}
    return {
        **scale,
        "max_ongoing_requests": limit,
        "max_queued_requests": _INGRESS_QUEUE,
        "backpressure_config": _busy(config),
        "graceful_shutdown_timeout_s": config.replica.graceful_shutdown_timeout_s + _LAST_EVENTS_S,
        # A dead one is noticed by its check only, and with Serve's 10 s the port refused as long.
        "health_check_period_s": config.replica.health_check_period_s,
        "ray_actor_options": {"num_cpus": 0, "runtime_env": {"env_vars": variables}},
    }


def _busy(config: AppConfig) -> BackpressureConfig:
    """Return how Serve refuses what finds its queue full."""
    return BackpressureConfig(status_code=503, retry_after_s=config.ingress.retry_after_s)


def engine_options(config: AppConfig, on_cpus: bool | None = None) -> dict[str, Any]:
    """Return the Serve options of the `Engine` deployment: scale, placement, queue, health.

    Args:
        on_cpus: whether engines compute on CPUs; None asks the installed vLLM.
    """
    replica = config.replica
    options: dict[str, Any] = {
        "num_replicas": replica.count,
        "max_ongoing_requests": config.max_ongoing_requests,
        "max_queued_requests": replica.max_queued_requests,
        "backpressure_config": _busy(config),
        "graceful_shutdown_timeout_s": replica.graceful_shutdown_timeout_s,
        "health_check_period_s": replica.health_check_period_s,
        "health_check_timeout_s": 10.0,
        "ray_actor_options": {
            "num_cpus": replica.cpus,
            "runtime_env": {"env_vars": dict(_MESSAGES)},
        },
    }
    if (router := _ROUTERS.get(config.routing.policy)) is not None:
        options["request_router_config"] = RequestRouterConfig.model_validate(
            {"request_router_class": router}
        )
    if replica.placement_group_bundles:
        # vLLM's Ray executor puts one worker into each bundle; the replica shares the first.
        options["placement_group_bundles"] = replica.placement_group_bundles
        options["placement_group_strategy"] = replica.placement_group_strategy
    elif gpus := _gpus(config, on_cpus):
        options["ray_actor_options"]["num_gpus"] = gpus
    return options


def _gpus(config: AppConfig, on_cpus: bool | None) -> float:
    if config.replica.gpus is not None:
        return config.replica.gpus
    if on_cpus is None:
        from adakv_serve.serving.vllm_engine.options import computes_on_cpus

        # The build of vLLM decides: the node that builds the application may have no GPU.
        on_cpus = computes_on_cpus()
    return 0 if on_cpus else config.tensor_parallel_size


def api_keys(config: AppConfig) -> tuple[str, ...]:
    """Return the keys in the environment variable that the configuration names.

    Raises:
        ValueError: the configuration asks for keys, but there are none.
    """
    auth = config.auth
    listed = os.environ.get(auth.api_keys_env, "").split(",")
    keys = tuple(key for key in map(str.strip, listed) if key)
    if not keys and "api_keys_env" in auth.model_fields_set:
        raise ValueError(
            f"auth asks for API keys, but {auth.api_keys_env} is empty in the environment of the "
            "cluster that builds the application"
        )
    return keys
