"""Real text for prompts, shipped with the repository (`texts/README.md` says whose)."""

import functools
import lzma
from pathlib import Path

_TEXTS = Path(__file__).parent / "texts"


@functools.cache
def novels() -> str:
    """Three novels of Jane Austen's, 1.6 million characters, a paragraph a line."""
    return _read("novels")


@functools.cache
def code() -> str:
    """Modules of Python's standard library, 1.4 million characters."""
    return _read("code")


def _read(name: str) -> str:
    return lzma.decompress((_TEXTS / f"{name}.txt.xz").read_bytes()).decode()
