"""The `Ingress` deployment: the front door on Ray Serve."""

import asyncio
import contextlib
import functools
import ipaddress
import logging
import os
import pickle
import uuid
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

from ray import serve
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import DeploymentStatus, ReplicaState

from adakv_serve.router.footprint import Footprint
from adakv_serve.router.ledger.redis_ledger import LedgerKeys
from adakv_serve.serving.config import AppConfig
from adakv_serve.serving.http.api_keys import vllm_keys
from adakv_serve.serving.http.asgi import ASGIApp, Message, Scope, route_path
from adakv_serve.serving.http.continued_streams import ContinuedStreams
from adakv_serve.serving.http.decoded import without_decoded
from adakv_serve.serving.http.door_settings import FrontDoorSettings
from adakv_serve.serving.http.draining import Running
from adakv_serve.serving.http.front_door import FrontDoor
from adakv_serve.serving.http.tracing import carried, span, start_tracing
from adakv_serve.serving.ingress.cluster_doors import refuse_tls_options, warn_of_open_cluster
from adakv_serve.serving.ingress.cors import with_cors
from adakv_serve.serving.ingress.departure import Departure
from adakv_serve.serving.ingress.fleet_page import with_fleet_page
from adakv_serve.serving.ingress.footprints import (
    FootprintPredictor,
    Prediction,
    footprint_predictor,
)
from adakv_serve.serving.ingress.losses import named_failures
from adakv_serve.serving.ingress.occupancy_router import OccupancyRouter
from adakv_serve.serving.ingress.output_counter import OutputCounter
from adakv_serve.serving.ingress.prediction_metrics import PredictionMetrics
from adakv_serve.serving.ingress.routing import Routing, configured_routing
from adakv_serve.serving.ingress.sender import Sender
from adakv_serve.serving.ingress.shedding import Shedding
from adakv_serve.serving.ingress.watched import Watched
from adakv_serve.serving.metrics import TaskMetrics
from adakv_serve.serving.store import store_url
from adakv_serve.serving.supervision import Supervisor

logger = logging.getLogger("ray.serve")

# Of a prompt that is not rendered.
_BYTES_PER_TOKEN = 4
# By a fleet's status: states of replicas that it has at zero, on the way there, and back.
_AT_REST = {
    DeploymentStatus.HEALTHY: {ReplicaState.STOPPING},
    DeploymentStatus.DOWNSCALING: {ReplicaState.STOPPING},
    DeploymentStatus.UPSCALING: {ReplicaState.STOPPING, ReplicaState.STARTING},
}


class HandleBackend:
    """Backend that calls the `Engine` deployment over gRPC and names its failures."""

    def __init__(
        self,
        engine: DeploymentHandle[Any],
        predictor: FootprintPredictor | None,
        rests: Callable[[], bool] = lambda: False,
        routing: Routing | None = None,
    ) -> None:
        """
        Args:
            predictor: None if footprints play no part in routing.
            rests: see `fleet_rests`.
            routing: is told when requests have an output, and when they have ended.
        """
        self._routing = routing
        self._rests = rests
        self._asking: asyncio.Task[bool] | None = None
        # By reference, every chunk of a stream would become a Ray object.
        self._stream: Any = engine.options(stream=True, _by_reference=False).asgi
        self._ping = engine.options(_by_reference=False).ping
        self._predictor = predictor
        self._metrics = PredictionMetrics()
        self._shedding = Shedding()

    async def stream(
        self, scope: Scope, body: bytes, pay: Callable[[int], None] = lambda tokens: None
    ) -> AsyncGenerator[list[Message], None]:
        sender = Sender.of(scope["headers"])
        predicted = Prediction(None, body, priority=sender.priority)
        if self._predictor is not None:
            with span("predict"):
                predicted = await self._predictor.predict(route_path(scope), body, sender)
            self._metrics.note(predicted)
        if predicted.body is not body:
            scope = _sized(scope, predicted.body)
        counter = OutputCounter()
        footprint = predicted.footprint
        prompt = len(body) // _BYTES_PER_TOKEN if footprint is None else footprint.prompt_tokens
        if footprint is not None:
            traceparent = carried().get("traceparent")
            footprint = footprint._replace(traceparent=traceparent, booking=uuid.uuid4().hex)
        call = functools.partial(self._stream.remote, scope, predicted.body, footprint)
        with named_failures(), self._booked(footprint):
            # A stopping replica cancels the call. Inside, that becomes an exception, so that the
            # payment is taken back.
            with _paid_unless_refused(pay, prompt), named_failures():
                response, item = await self._shedding.begin(call, predicted.priority)
            if self._routing is not None and footprint is not None:
                self._routing.answered(footprint)
            try:
                while item is not None:
                    batch, decoded = without_decoded(_batch(item))
                    if _is_refusal(batch):
                        pay(-prompt)
                    before = counter.tokens
                    counter.see(batch, decoded)
                    pay(counter.tokens - before)
                    yield batch
                    item = await anext(response, None)
            except (GeneratorExit, asyncio.CancelledError):
                response.cancel()
                raise
        if self._predictor is not None and counter.tokens:
            tokens = counter.tokens // predicted.answers
            self._predictor.note_output(predicted.kind, tokens)
            self._metrics.note_output(predicted, counter.tokens)

    @contextlib.contextmanager
    def _booked(self, footprint: Footprint | None) -> Iterator[None]:
        """Tell the routing when the request in the context has ended."""
        try:
            yield
        finally:
            if self._routing is not None and footprint is not None:
                self._routing.ended(footprint)

    async def _asked_whether_it_rests(self) -> bool:
        # Serve's controller may hang: all probes wait for one question, which blocks one thread.
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(asyncio.to_thread(self._rests))
        return await asyncio.shield(self._asking)

    async def ping(self) -> None:
        # A call would start a replica of a fleet that has gone to zero.
        with named_failures():
            if await self._asked_whether_it_rests():
                return
            # In a saturated fleet the call would wait behind all requests.
            if self._routing is not None and self._routing.has_fresh_report:
                return
            await self._ping.remote()


@contextlib.contextmanager
def _paid_unless_refused(pay: Callable[[int], None], tokens: int) -> Iterator[None]:
    """Pay at once, so that no others begin meanwhile, and take it back if nothing begins."""
    pay(tokens)
    try:
        yield
    except Exception:
        pay(-tokens)
        raise


def fleet_rests() -> bool:
    """Return whether the fleet is at zero replicas by its autoscaling, or comes back from there."""
    if OccupancyRouter.replica_count:
        return False
    application = serve.status().applications.get(serve.get_replica_context().app_name)
    engine = application.deployments.get("Engine") if application is not None else None
    if engine is None or engine.status not in _AT_REST:
        return False
    return set(engine.replica_states) <= _AT_REST[engine.status]


def _sized(scope: Scope, body: bytes) -> Scope:
    """Return a request's scope with the length of its body, which may have changed."""
    headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
    return {**scope, "headers": [*headers, (b"content-length", str(len(body)).encode())]}


def _batch(item: bytes | list[Message]) -> list[Message]:
    # Inside an HTTP request Serve returns gRPC results still pickled.
    messages: list[Message] = pickle.loads(item) if isinstance(item, bytes) else item
    return messages


def _is_refusal(batch: list[Message]) -> bool:
    """Return whether a batch begins an answer with an error: no prompt was computed for it."""
    return bool(batch) and batch[0].get("status", 200) >= 400


@serve.ingress()
class Ingress:
    """The deployment that answers HTTP: a front door before the `Engine` replicas."""

    def __init__(
        self, engine: DeploymentHandle[Any], settings: FrontDoorSettings, config: AppConfig
    ) -> None:
        self._config = config
        refuse_tls_options(http_options(), has_haproxy=RAY_SERVE_ENABLE_HA_PROXY)
        warn_of_open_cluster(os.environ, logger)
        start_tracing(config.engine.get("otlp_traces_endpoint"), "adakv ingress")
        self._tasks = Supervisor(TaskMetrics().note)
        self._routing = OccupancyRouter.routing = configured_routing(config)
        predictor = footprint_predictor(config) if self._routing is not None else None
        self._backend = HandleBackend(engine, predictor, fleet_rests, self._routing)
        self._settings = settings._replace(api_keys=(*settings.api_keys, *vllm_keys()))
        if not self._settings.has_keys:
            refuse_open_door(http_options().host, is_meant=config.auth.open)
            refuse_limits_without_keys(self._settings)
            logger.warning("no API keys are set: anyone who reaches the port can use the API")

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        if self._routing is not None:
            keys = LedgerKeys(self._config.store.key_prefix, serve.get_replica_context().app_name)
            self._routing.listen(store_url(self._config.store), keys, self._tasks)
        self._door = FrontDoor(
            ContinuedStreams(self._backend, logger), self._settings, logger, doors=self._doors()
        )
        app = with_fleet_page(self._door, self._door, self._config, self._routing, self._tasks)
        limit_s = self._config.replica.graceful_shutdown_timeout_s
        departure = Departure(limit_s, logger, has_own_port=RAY_SERVE_ENABLE_HA_PROXY)
        self._tasks.keep("departure", lambda: departure.end_at_limit(self._door.draining))
        return departure.noting_address(with_cors(app, self._config.server))

    def _doors(self) -> Callable[[], int]:
        """Return what returns the number of front doors, which divide the limits of keys."""
        ingress, application = self._config.ingress, serve.get_replica_context().app_name
        if ingress.max_count is None or not self._settings.has_limits:
            return lambda: serve.get_replica_context().world_size
        # In an autoscaled deployment Serve's `world_size` is always 1.
        watch = Watched("the number of front doors", lambda: running_doors(application))
        self._tasks.keep("front doors", watch.run)
        return lambda: watch.latest or ingress.count

    async def drain(self, refuse_s: float) -> list[Running]:
        """Refuse new requests for so long from now on; return those that run."""
        self._door.draining.refuse_for(refuse_s)
        return self._door.draining.running()

    async def cut(self) -> None:
        """End all requests, streams with an error event."""
        self._door.draining.cut_all()

    async def check_health(self) -> None:
        self._tasks.check()


def running_doors(application: str) -> int | None:
    """Return the number of an application's front doors that run; None if it is unknown."""
    found = serve.status().applications.get(application)
    ingress = found.deployments.get("Ingress") if found is not None else None
    return ingress.replica_states.get(ReplicaState.RUNNING) if ingress is not None else None


def refuse_limits_without_keys(settings: FrontDoorSettings) -> None:
    """Refuse limits that could be evaded by another made-up key.

    Raises:
        ValueError: there are limits.
    """
    if settings.has_limits:
        raise ValueError("auth.limits and auth.limits_by_key need API keys, and there are none")


def http_options() -> HTTPOptions:
    """Return the options of Serve's proxies; their host is None if there are none."""
    client = _get_global_client()
    assert client is not None, "an ingress is part of a cluster"
    return client._http_config


def refuse_open_door(host: str | None, *, is_meant: bool) -> None:
    """Refuse to serve without keys where others can reach the API.

    Raises:
        ValueError: others can reach the host, and the door is not meant to be open.
    """
    if is_meant or host in (None, "localhost"):
        return
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return
    raise ValueError(
        f"there are no API keys, and anyone who reaches {host} could use the API: set "
        "auth.keys_file or the variable that auth.api_keys_env names (in the "
        "environment of `ray start` on a cluster that runs), http_options.host to 127.0.0.1, or "
        "auth.open: true"
    )
