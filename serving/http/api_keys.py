"""The keys that open the front door."""

import hashlib
import os
import secrets
from collections.abc import Mapping

_OPEN_PATHS = ("/health", "/version")
VLLM_VARIABLE = "VLLM_API_KEY"


def vllm_keys() -> tuple[str, ...]:
    """Return the key in vLLM's own variable, which works here too."""
    key = os.environ.get(VLLM_VARIABLE, "").strip()
    return (key,) if key else ()


class ApiKeys:
    """Checks `Authorization: Bearer KEY`; without keys everything is open."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [_digest(key) for key in keys]

    def allow(self, path: str, method: str, headers: Mapping[str, str]) -> bool:
        """Return whether a request with these headers (names in lower case) may pass."""
        if not self._digests or path in _OPEN_PATHS or method == "OPTIONS":
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key)
        # Compare every key, so that the time taken reveals nothing.
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
