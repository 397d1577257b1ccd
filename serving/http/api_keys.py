"""The keys that open the front door."""

import contextlib
import hashlib
import os
import secrets
from collections.abc import Mapping
from typing import NamedTuple

from adakv_serve.serving.http.key_file import KeyFile

# They need no key, and get no body.
OPEN_PATHS = ("/health", "/version")
_DIGITS = 16
_LOGGED_DIGITS = 8
VLLM_VARIABLE = "VLLM_API_KEY"


def vllm_keys() -> tuple[str, ...]:
    """Return the key in vLLM's own variable, which works here too."""
    key = os.environ.get(VLLM_VARIABLE, "").strip()
    return (key,) if key else ()


class Caller(NamedTuple):
    """Who sends a request.

    tenant: whose cached prompts its requests may find: those of all keys of one name; None for
        those of all callers without a key.
    name: the key's name, for logs.
    """

    tenant: str | None = None
    name: str = "-"


class ApiKeys:
    """Checks `Authorization: Bearer KEY`; without keys everything is open.

    A key with characters beyond ASCII counts in UTF-8, and in Latin-1 where a client sends that.
    """

    def __init__(
        self,
        keys: tuple[str, ...],
        file: KeyFile | None = None,
        more_digests: tuple[bytes, ...] = (),
    ) -> None:
        """
        Args:
            file: has further keys.
            more_digests: `digests_of` further keys.
        """
        digests = (*digests_of(keys), *more_digests)
        self._listed = {digest: _of_digest(digest) for digest in digests}
        self._file = file

    def caller(self, path: str, headers: Mapping[str, str]) -> Caller | None:
        """Return who sends a request; None if it may not pass.

        Args:
            headers: by names in lower case, each the bytes of the request in Latin-1.
        """
        scheme, _, key = headers.get("authorization", "").partition(" ")
        digest = _digest(key.encode("latin-1", "replace"))
        if not self._listed and self._file is None:
            # Who checks keys before us may pass them on.
            return _of_digest(digest) if key else Caller()
        callers = self._listed
        if self._file is not None:
            self._file.refresh()
            named = {known: _of_name(name) for known, name in self._file.names.items()}
            callers = {**callers, **named}
        # Compare every key, so that the time taken reveals nothing.
        matches = [
            caller for known, caller in callers.items() if secrets.compare_digest(digest, known)
        ]
        if scheme.lower() == "bearer" and matches:
            return matches[0]
        return Caller() if path in OPEN_PATHS else None


def _of_digest(digest: bytes) -> Caller:
    return Caller(digest.hex()[:_DIGITS], f"key-{digest.hex()[:_LOGGED_DIGITS]}")


def _of_name(name: str) -> Caller:
    return Caller(f"name:{name}", name)


def digests_of(keys: tuple[str, ...]) -> tuple[bytes, ...]:
    """Return the digests by which `ApiKeys` recognizes keys."""
    return tuple(_digest(form) for key in keys for form in _forms(key))


def _forms(key: str) -> set[bytes]:
    """Return the bytes in which a client may send a key."""
    forms = {key.encode()}
    with contextlib.suppress(UnicodeEncodeError):
        forms.add(key.encode("latin-1"))
    return forms


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
