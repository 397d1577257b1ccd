"""Server-sent events as vLLM writes them: one JSON object an event, on a `data:` line."""

import json
from typing import Any

_DATA = b"data: "


def split_events(stream: bytes) -> tuple[list[bytes], bytes]:
    """Return the whole events at the beginning of `stream`, each with its end, and the rest."""
    *events, rest = stream.split(b"\n\n")
    return [event + b"\n\n" for event in events], rest


def data_of(event: bytes) -> dict[str, Any] | None:
    """Return the event's JSON object, None if it has none."""
    for line in event.split(b"\n"):
        if line.startswith(_DATA + b"{"):
            return json.loads(line.removeprefix(_DATA))
    return None


def with_data(event: bytes, data: dict[str, Any]) -> bytes:
    """Return the event with another JSON object; its other lines stay."""
    lines = [
        _DATA + compact_json(data) if line.startswith(_DATA) else line
        for line in event.split(b"\n")
    ]
    return b"\n".join(lines)


def compact_json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
