"""The endpoints that the front door lets through to an engine."""

from collections.abc import Iterable

# These answer prompts or describe models. vLLM's other endpoints change the replica that the
# request happens to reach, and no other: they put it to sleep, empty its caches, load adapters,
# run code.
_PATHS = (
    "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages",
    "/v1/systemone", "/generative_scoring", "/v1/embeddings", "/v1/score", "/v1/rerank",
    "/v2/rerank", "/v1/audio", "/v1/realtime",
    "/inference/v1/generate", "/tokenize", "/detokenize", "/pooling", "/classify", "/score",
    "/rerank", "/invocations", "/ping", "/health", "/version", "/docs", "/redoc", "/openapi.json",
)  # fmt: skip


class Paths:
    """An allow-list: these paths and everything below them."""

    def __init__(self, more: Iterable[str] = ()) -> None:
        self._paths = tuple(path.rstrip("/") for path in (*_PATHS, *more))

    def allow(self, path: str) -> bool:
        return path == "/" or any(
            path == allowed or path.startswith(f"{allowed}/") for allowed in self._paths
        )
