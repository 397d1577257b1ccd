"""What a request says of its client: tenant, session and priority."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from adakv_serve.router.session_hints import session_key
from adakv_serve.serving.http.priority import Headers, header_priority
from adakv_serve.serving.http.rendered import Handling
from adakv_serve.serving.http.tenants import TENANT_HEADER

_SESSION_HEADER = b"x-session-id"


class Sender(NamedTuple):
    """A request's client, from its headers and then from its body, as vLLM reads them.

    session_id: the conversation's name; the body's counts more than the header's.
    header_priority: the header's priority, which counts more than the body's; None without one.
    """

    tenant: str | None = None
    session_id: str | None = None
    header_priority: int | None = None
    body_priority: int = 0

    @classmethod
    def of(cls, headers: Headers) -> Self:
        """Return the client of a request that was let in. The first of equal headers counts."""
        named: dict[bytes, str] = {}
        for name, value in headers:
            if name in (TENANT_HEADER, _SESSION_HEADER):
                named.setdefault(name, value.decode("latin-1"))
        session = named.get(_SESSION_HEADER) or None
        return cls(named.get(TENANT_HEADER), session, header_priority(headers))

    def with_body(self, handling: Handling, options: Mapping[str, Any] | None = None) -> Self:
        """Return the client with what the body says.

        Args:
            options: the body's `vllm_xargs`, in which vLLM looks for a session at last.
        """
        named = handling.session_id or self.session_id or (options or {}).get("session_id")
        return self._replace(
            session_id=named if isinstance(named, str) else None,
            body_priority=handling.priority,
        )

    @property
    def priority(self) -> int:
        """The request's priority; a lower number is more important, and 0 is usual."""
        return self.body_priority if self.header_priority is None else self.header_priority

    @property
    def session(self) -> int | None:
        """The session's key for routers; None without a session."""
        return session_key(self.tenant, self.session_id) if self.session_id else None
