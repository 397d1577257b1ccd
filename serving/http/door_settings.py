"""Limits and keys of the front door."""

from pathlib import Path
from typing import NamedTuple

from adakv_serve.serving.http.key_limits import Limits


class FrontDoorSettings(NamedTuple):
    """Limits and keys of the front door."""

    api_keys: tuple[str, ...] = ()
    # Serve stores these settings, so keys come as digests.
    key_digests: tuple[bytes, ...] = ()
    keys_file: Path | None = None
    shares_caches: bool = False
    limits: Limits = Limits()
    limits_by_key: tuple[tuple[str, Limits], ...] = ()
    # Number of requests that the fleet computes and queues.
    places: int = 1000
    more_paths: tuple[str, ...] = ()
    max_body_bytes: int = 16 * 1024 * 1024
    max_held_body_bytes: int = 256 * 1024 * 1024
    body_timeout_s: float = 60.0
    retry_after_s: float = 1.0
    request_deadline_s: float = 3600.0
    health_timeout_s: float = 2.0

    @property
    def has_limits(self) -> bool:
        return self.limits != Limits() or bool(self.limits_by_key)

    @property
    def has_keys(self) -> bool:
        return bool(self.api_keys or self.key_digests) or self.keys_file is not None
