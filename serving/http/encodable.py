"""Finds strings that UTF-8 cannot encode in request bodies, and parses only suspicious bodies."""

import json
import re

from adakv_worker.frontend.encodable import unencodable

# Surrogates as raw bytes, which Python's JSON decoder accepts. No valid character has these bytes.
_RAW = re.compile(rb"\xed[\xa0-\xbf]")
# Whole escapes, so that an escaped backslash starts none. The group matches half a pair.
_ESCAPES = re.compile(
    rb"\\(?:"
    rb"u[dD][89aAbB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}"
    rb"|(u[dD][89a-fA-F][0-9a-fA-F]{2})"
    rb"|.)",
    re.DOTALL,
)


def unencodable_field(body: bytes) -> str | None:
    """Return the path of the first string in a JSON body that UTF-8 cannot encode, or None."""
    if not is_suspicious(body):
        return None
    try:
        return unencodable(json.loads(body))
    except (ValueError, RecursionError):
        # Not JSON, or nested too deeply for any reader here.
        return None


def is_suspicious(body: bytes) -> bool:
    """Return whether the body may have such a string, without parsing it."""
    # Zero bytes mean UTF-16 or UTF-32, which JSON may use too.
    if b"\0" in body or (not body.isascii() and _RAW.search(body)):
        return True
    if b"\\ud" not in body and b"\\uD" not in body:
        return False
    return any(found[1] for found in _ESCAPES.finditer(body))
