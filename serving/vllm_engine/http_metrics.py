"""vLLM's HTTP metrics of a replica, on Ray's Prometheus endpoint."""

from typing import Any

from prometheus_fastapi_instrumentator.metrics import Info
from ray.serve.metrics import Counter, Histogram

_BUCKETS_S = [0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0]


class HttpMetrics:
    """Counts responses by route, method and status, under vLLM's names."""

    def __init__(self) -> None:
        labels: Any = ("method", "handler", "status")  # Ray annotates a tuple of one.
        self._requests = Counter("http_requests", "HTTP requests that were answered", labels)
        self._seconds = Histogram(
            "http_request_duration_seconds", "From an HTTP request to the end of its answer",
            _BUCKETS_S, labels[:2],
        )  # fmt: skip

    def note(self, answered: Info) -> None:
        """Count one answer."""
        tags = {"method": answered.method, "handler": answered.modified_handler}
        self._seconds.observe(answered.modified_duration, tags=tags)
        self._requests.inc(tags={**tags, "status": answered.modified_status})
