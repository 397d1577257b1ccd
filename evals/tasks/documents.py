"""Questions about real documents, profiles of countries."""

import functools
import lzma
import re
from collections.abc import Iterator
from pathlib import Path

from adakv_serve.evals.samples import Sample, Turn
from adakv_serve.evals.tasks.source import Source

_TEXT = Path(__file__).parents[1] / "texts" / "factbook.txt.xz"
_ASKED = 5
# Room for a question and the chat format.
_AROUND_TOKENS = 64
# A value that an answer can repeat word by word.
_ANSWER = re.compile(r"[^;:()]{4,40}")


def factbook(source: Source) -> Iterator[Sample]:
    """Yield five questions about each country's profile (LongBench's single documents)."""
    names = sorted(_profiles())
    source.rng.shuffle(names)
    for name in names:
        lines = _beginning(source, _profiles()[name])
        entries = [line.split(": ", 1) for line in lines]
        askable = [(key, value) for key, value in entries if _is_answer(source, value)]
        text = f"Profile of {name}\n" + "\n".join(lines)
        for key, value in source.rng.sample(askable, min(_ASKED, len(askable))):
            question = (
                f'What does the profile of {name} say under "{key}"? Answer exactly as it is '
                "written there and nothing else."
            )
            turns = (Turn(question, ""),)
            yield Sample("factbook", f"{name}/{key}", name, text, turns, f" {value}", f"{key}:")


def _is_answer(source: Source, value: str) -> bool:
    # The prefill alone predicts an answer of one token.
    tokens = source.tokenizer.encode(f" {value}", add_special_tokens=False)
    return _ANSWER.fullmatch(value) is not None and len(tokens) > 1


def _beginning(source: Source, lines: list[str]) -> list[str]:
    """Return as many whole lines as fit the document."""
    room = source.document_tokens - _AROUND_TOKENS
    taken = []
    for line in lines:
        room -= len(source.tokenizer.encode(line, add_special_tokens=False)) + 1
        if room < 0:
            break
        taken.append(line)
    return taken


@functools.cache
def _profiles() -> dict[str, list[str]]:
    """Return lines `section - entry: text` by country."""
    text = lzma.decompress(_TEXT.read_bytes()).decode()
    profiles = {}
    for part in text.strip().split("\n\n"):
        name, *lines = part.split("\n")
        profiles[name] = lines
    return profiles
