"""Names what a Serve handle raises: the loss of a replica, an overload, or a fault in its code."""

import asyncio
import contextlib
import re
from collections.abc import Iterator

import grpc
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from adakv_serve.serving.http.failures import NoReplica, Overloaded, ReplicaDown, ReplicaLost

# How a call ends whose replica's process has died, or whose server has been stopped.
_LOST = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}
# The plain RuntimeError of a call that ended before the replica had accepted the request.
_NOT_ACCEPTED = re.compile(r"Unexpected error \(StatusCode\.(\w+)\)")


@contextlib.contextmanager
def named_failures() -> Iterator[None]:
    """Translate what a handle raises inside, where it is one of the known failures.

    Raises:
        BackendFailure: see there.
        Exception: what the replica's code or the handle's has raised besides, unchanged.
    """
    try:
        yield
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # Nobody here has cancelled anything: the replica has, as it stops.
        raise ReplicaLost("the replica has cancelled the request") from error
    except Exception as error:
        if (failure := _known(error)) is None:
            raise
        raise failure from error


def _known(error: Exception) -> Exception | None:
    if isinstance(error, BackPressureError):
        return Overloaded(error.retry_after_s)
    if isinstance(error, DeploymentUnavailableError):
        return NoReplica(str(error))
    # A replica tells of its engine. Ray's errors are also instances of their causes' classes.
    for kind in (ReplicaDown, ReplicaLost):
        if isinstance(error, kind):
            return kind(str(error))
    return ReplicaLost(str(error)) if _is_loss(error) else None


def _is_loss(error: Exception) -> bool:
    if isinstance(error, RayActorError):
        # One in a replica's code tells of another actor.
        return not isinstance(error, RayTaskError)
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() in _LOST
    if type(error) is RuntimeError and (found := _NOT_ACCEPTED.match(str(error))):
        return found[1] in {code.name for code in _LOST}
    return False
