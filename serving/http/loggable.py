"""Text from requests, as log lines show it."""

_MOST_CHARACTERS = 512


def loggable(text: str) -> str:
    """Return text in which nothing ends a log line, at most 512 characters of it."""
    shown = "".join(
        one if one.isprintable() else f"\\u{ord(one):04x}" for one in text[:_MOST_CHARACTERS]
    )
    return shown + "..." * (len(text) > _MOST_CHARACTERS)
