"""The keys that open the front door."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Mapping

from serving.http.key_file import KeyFile

# They need no key, and get no body.
OPEN_PATHS = ("/health", "/version")
VLLM_VARIABLE = "VLLM_API_KEY"


def vllm_keys() -> tuple[str, ...]:
    """Return the key in vLLM's own variable, which works here too."""
    key = os.environ.get(VLLM_VARIABLE, "").strip()
    return (key,) if key else ()


class ApiKeys:
    """Checks `Authorization: Bearer KEY`; without keys everything is open.

    A key with characters beyond ASCII counts in UTF-8, and in Latin-1 where a client sends that.
    """

    def __init__(self, keys: tuple[str, ...], file: KeyFile | None = None) -> None:
        """
        Args:
            file: has further keys.
        """
        self._digests = [_digest(form) for key in keys for form in _forms(key)]
        self._file = file

    def allow(self, path: str, headers: Mapping[str, str]) -> bool:
        """Return whether a request may pass.

        Args:
            headers: by names in lower case, each the bytes of the request in Latin-1.
        """
        if path in OPEN_PATHS or (not self._digests and self._file is None):
            return True
        digests = self._digests
        if self._file is not None:
            self._file.refresh()
            digests = [*digests, *self._file.digests]
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.encode("latin-1", "replace"))
        # Compare every key, so that the time taken reveals nothing.
        matches = [secrets.compare_digest(digest, known) for known in digests]
        return scheme.lower() == "bearer" and any(matches)


def _forms(key: str) -> set[bytes]:
    """Return the bytes in which a client may send a key."""
    forms = {key.encode()}
    with contextlib.suppress(UnicodeEncodeError):
        forms.add(key.encode("latin-1"))
    return forms


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
