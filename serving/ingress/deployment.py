"""The `Ingress` deployment: the front door on Ray Serve."""

import asyncio
import logging
import pickle
from collections.abc import AsyncGenerator
from typing import Any

import grpc
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle
from starlette.middleware.cors import CORSMiddleware

from router.ledger.redis_ledger import LedgerKeys
from serving.config import AppConfig
from serving.http.api_keys import vllm_keys
from serving.http.asgi import ASGIApp, Message
from serving.http.front_door import FrontDoor, FrontDoorSettings, NoReplica, Overloaded, ReplicaLost
from serving.ingress.footprints import FootprintPredictor, OutputCounter, footprint_predictor
from serving.ingress.routing import start_routing
from serving.store import store_url

logger = logging.getLogger("ray.serve")


class HandleBackend:
    """Calls the `Engine` deployment over gRPC and names its failures in the front door's terms."""

    def __init__(self, engine: DeploymentHandle, predictor: FootprintPredictor | None) -> None:
        """
        Args:
            predictor: None where replicas are not chosen by footprint.
        """
        # By reference, every chunk of a stream would become a Ray object.
        self._stream: Any = engine.options(stream=True, _by_reference=False).asgi
        self._ping = engine.options(_by_reference=False).ping
        self._predictor = predictor

    async def stream(self, scope: dict, body: bytes) -> AsyncGenerator[list[Message], None]:
        footprint = None
        if self._predictor is not None:
            footprint = await self._predictor.footprint(scope["path"], body)
        response = self._stream.remote(scope, body, footprint)
        counter = OutputCounter()
        try:
            async for item in response:
                batch = _batch(item)
                counter.see(batch)
                yield batch
            if self._predictor is not None and counter.tokens:
                self._predictor.note_output(counter.tokens)
        except (GeneratorExit, asyncio.CancelledError):
            response.cancel()
            raise
        except Exception as error:
            raise _translated(error) from error

    async def ping(self) -> None:
        try:
            await self._ping.remote()
        except Exception as error:
            raise _translated(error) from error


def _batch(item: Any) -> list[Message]:
    # Inside an HTTP request Serve hands gRPC results on as it received them, pickled.
    return pickle.loads(item) if isinstance(item, bytes) else item


def _translated(error: Exception) -> Exception:
    if isinstance(error, BackPressureError):
        return Overloaded(error.retry_after_s)
    if isinstance(error, DeploymentUnavailableError):
        return NoReplica(str(error))
    if isinstance(error, ReplicaLost) or _of_the_way(error):
        return ReplicaLost(str(error))
    # An exception of the replica's code, which another replica would raise again.
    return error


def _of_the_way(error: Exception) -> bool:
    """Return whether the handle raises it by itself: dead actors, broken connections."""
    if isinstance(error, RayTaskError):
        return False
    # A plain RuntimeError is the handle's, too, where a call fails before the replica accepts it.
    return type(error) is RuntimeError or isinstance(
        error, (RayError, RayServeException, grpc.RpcError, OSError)
    )


@serve.ingress()
class Ingress:
    def __init__(
        self, engine: DeploymentHandle, settings: FrontDoorSettings, config: AppConfig
    ) -> None:
        self._config = config
        self._routing = start_routing(config)
        predictor = footprint_predictor(config) if self._routing is not None else None
        self._backend = HandleBackend(engine, predictor)
        self._settings = settings._replace(api_keys=(*settings.api_keys, *vllm_keys()))
        if not self._settings.api_keys:
            logger.warning("no API keys are set: the API is open to all who reach its port")

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        if self._routing is not None:
            keys = LedgerKeys(self._config.store.key_prefix, serve.get_replica_context().app_name)
            self._routing.listen(store_url(self._config.store), keys)
        door = FrontDoor(self._backend, self._settings, logger)
        return with_cors(door, self._config.server)


def with_cors(app: ASGIApp, server: dict[str, Any]) -> ASGIApp:
    """Return an app whose own answers, errors among them, allow the origins that vLLM's do."""
    if not (origins := server.get("allowed_origins")):
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_credentials=server.get("allow_credentials", False),
        allow_methods=server.get("allowed_methods", ["*"]),
        allow_headers=server.get("allowed_headers", ["*"]),
    )
