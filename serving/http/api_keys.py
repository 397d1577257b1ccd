"""The keys that open the front door."""

import hashlib
import os
import secrets

_OPEN_PATHS = ("/health", "/version")
VLLM_VARIABLE = "VLLM_API_KEY"


def vllm_keys() -> tuple[str, ...]:
    """Return the key in the variable of vLLM, whose users expect it to be asked for."""
    key = os.environ.get(VLLM_VARIABLE, "").strip()
    return (key,) if key else ()


class ApiKeys:
    """Checks `Authorization: Bearer KEY`; without keys everything is open."""

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._digests = [_digest(key) for key in keys]

    def allow(self, path: str, method: str, headers: dict[str, str]) -> bool:
        if not self._digests or path in _OPEN_PATHS or method == "OPTIONS":
            return True
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key)
        # Every key is compared, so that the time taken reveals nothing.
        matches = [secrets.compare_digest(digest, known) for known in self._digests]
        return scheme.lower() == "bearer" and any(matches)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
