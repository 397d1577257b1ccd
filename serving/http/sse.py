"""Server-sent events in vLLM's form: one JSON object an event, on one `data:` line."""

import json
from typing import Any

JsonObject = dict[str, Any]

_DATA = b"data: "


def split_events(stream: bytes) -> tuple[list[bytes], bytes]:
    """Return the complete events of `stream`, each with its terminator, and the rest."""
    *events, rest = stream.split(b"\n\n")
    return [event + b"\n\n" for event in events], rest


def data_of(event: bytes) -> JsonObject | None:
    """Return the event's JSON object, or None without one."""
    for line in event.split(b"\n"):
        if line.startswith(_DATA + b"{"):
            data: JsonObject = json.loads(line.removeprefix(_DATA))
            return data
    return None


def with_data(event: bytes, data: JsonObject) -> bytes:
    """Return the event with its JSON object replaced; other lines stay."""
    lines = [
        _DATA + compact_json(data) if line.startswith(_DATA) else line
        for line in event.split(b"\n")
    ]
    return b"\n".join(lines)


def compact_json(value: object) -> bytes:
    """Return the value as JSON without spaces, in UTF-8."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
