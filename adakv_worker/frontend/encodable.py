"""Finds strings that UTF-8 cannot encode.

JSON allows half of a surrogate pair and Python reads it, but it can be sent neither to an engine's
process nor to a client.
"""

from collections.abc import Iterator
from typing import Any

PROBLEM = "half of a surrogate pair, which UTF-8 cannot encode"


def unencodable(value: Any, name: str = "") -> str | None:
    """Return the path of the first string in nested dicts and lists that UTF-8 cannot encode.

    The path starts with `name`, as in `messages[1].content`. A key has the path of its dict.
    """
    waiting = [(name, value)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str):
            if not _encodes(value):
                return path
        elif isinstance(value, dict):
            if not all(_encodes(key) for key in value if isinstance(key, str)):
                return path
            waiting += reversed(list(_fields(path, value)))
        elif isinstance(value, list | tuple):
            waiting += reversed([(f"{path}[{index}]", one) for index, one in enumerate(value)])
    return None


def _fields(path: str, value: dict[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, one in value.items():
        yield f"{path}.{key}" if path else str(key), one


def _encodes(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
