"""The ways in which a backend fails, each with the error that the client gets."""

import traceback


class BackendFailure(Exception):
    """A request that no replica has finished; always answered by 503."""

    error_type = "ServiceUnavailable"
    message: str
    retry_after_s: float | None = None


class Overloaded(BackendFailure):
    """The queue in front of the replicas is full."""

    message = "too many requests are waiting for a replica"

    def __init__(self, retry_after_s: float | None) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class NoReplica(BackendFailure):
    """No replica can take requests."""

    message = "no replica is available"


class ReplicaLost(BackendFailure):
    """The replica died while it worked on the request."""

    error_type = "ReplicaLost"
    message = "the replica that worked on this request died"


class ReplicaDown(ReplicaLost):
    """The replica had lost its engine before the request came, so that no work was done."""

    message = "the replica that got this request has no engine"


class ReplicaFault(Exception):
    """What a replica's own code has raised; another replica would raise it again. A 500.

    Its only argument is the replica's traceback, because exceptions lose theirs on the way.
    """

    @classmethod
    def of(cls, error: Exception) -> "ReplicaFault":
        """Return what the ingress gets in place of an error; call it in the replica."""
        return cls("".join(traceback.format_exception(error)))
