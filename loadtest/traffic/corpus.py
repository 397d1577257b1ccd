"""Real text for prompts, shipped with the repository (`texts/README.md` names its sources)."""

import functools
import lzma
from pathlib import Path

# About 17 tokens, for prompts of which only the length matters.
SENTENCE = "The harbour master wrote down the weather of the hour and every ship that passed. "

_TEXTS = Path(__file__).parent / "texts"


@functools.cache
def novels() -> str:
    """Return three novels by Jane Austen: 1.6 million characters, a paragraph a line."""
    return _read("novels")


@functools.cache
def code() -> str:
    """Return modules of Python's standard library: 1.4 million characters."""
    return _read("code")


def _read(name: str) -> str:
    return lzma.decompress((_TEXTS / f"{name}.txt.xz").read_bytes()).decode()
