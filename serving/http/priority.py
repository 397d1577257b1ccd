"""The header that gives a request a priority, as vLLM reads it."""

from collections.abc import Sequence

PRIORITY_HEADER = b"x-vllm-priority"
# vLLM checks the range of the body's priority alone, and fails to send another one.
_LEAST, _MOST = -(2**63), 2**63 - 1

Headers = Sequence[tuple[bytes, bytes]]


def header_priority(headers: Headers) -> int | None:
    """Return the priority that the first such header gives, or None."""
    given = next((value for name, value in headers if name == PRIORITY_HEADER), b"")
    try:
        priority = int(given.decode("latin-1"))
    except ValueError:
        return None
    return priority if _LEAST <= priority <= _MOST else None


def with_usable_priority(headers: Headers) -> Headers:
    """Return headers of which vLLM reads the same priority, which it can send."""
    if header_priority(headers) is not None:
        return headers
    return [pair for pair in headers if pair[0] != PRIORITY_HEADER]
