"""Requests with strings that UTF-8 cannot encode, found without reading the others twice."""

import json
import re

from adakv_worker.frontend.encodable import unencodable

# Surrogates written as such, which Python's decoder lets pass. No character is encoded like this.
_RAW = re.compile(rb"\xed[\xa0-\xbf]")
# Each escape as a whole, so that an escaped backslash begins none; the group is half a pair.
_ESCAPES = re.compile(
    rb"\\(?:"
    rb"u[dD][89aAbB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(u[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|.)",
    re.DOTALL,
)


def unencodable_field(body: bytes) -> str | None:
    """Return the path of a JSON body's first string that UTF-8 cannot encode, if there is one."""
    if not _suspicious(body):
        return None
    try:
        return unencodable(json.loads(body))
    except (ValueError, RecursionError):
        # It is not JSON, or no JSON that anything here reads.
        return None


def _suspicious(body: bytes) -> bool:
    # JSON may be in UTF-16 or UTF-32, too, and only there are bytes of 0.
    if b"\0" in body or (not body.isascii() and _RAW.search(body)):
        return True
    if b"\\ud" not in body and b"\\uD" not in body:
        return False
    return any(found[1] for found in _ESCAPES.finditer(body))
