"""Classification by examples in the prompt."""

import functools
import itertools
import lzma
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from adakv_serve.evals.samples import Sample, Turn
from adakv_serve.evals.tasks.source import Source

_TEXT = Path(__file__).parents[1] / "texts" / "glosses.txt.xz"
_ASKED = 4
# Room for a question and the chat format.
_AROUND_TOKENS = 80


class _Gloss(NamedTuple):
    kind: str
    word: str
    meaning: str

    @property
    def line(self) -> str:
        return f"{self.word}: {self.meaning} -> {self.kind}"


def kinds(source: Source) -> Iterator[Sample]:
    """Yield words with their kinds, then one without (LongBench's TREC)."""
    for number in itertools.count():
        drawn = source.rng.sample(_glosses(), source.document_tokens // 8)
        asked, shown = drawn[:_ASKED], drawn[_ASKED:]
        text = "\n".join(_as_many_as_have_room(source, shown))
        for gloss in asked:
            # The prefill alone would predict an answer of one token.
            question = (
                "The lines tell what kind of thing each word is. Of what kind is this one? Answer "
                'with the word, an arrow "->" and the kind, and nothing else.\n'
                f"{gloss.word}: {gloss.meaning}"
            )
            turns = (Turn(question, ""),)
            document, answer = f"document-{number}", f" {gloss.word} -> {gloss.kind}"
            yield Sample(
                "kinds", f"{document}/{gloss.word}", document, text, turns, answer, "Answer:"
            )


def _as_many_as_have_room(source: Source, glosses: list[_Gloss]) -> Iterator[str]:
    room = source.document_tokens - _AROUND_TOKENS
    for gloss in glosses:
        room -= len(source.tokenizer.encode(gloss.line, add_special_tokens=False)) + 1
        if room < 0:
            return
        yield gloss.line


@functools.cache
def _glosses() -> list[_Gloss]:
    text = lzma.decompress(_TEXT.read_bytes()).decode()
    return [_Gloss(*line.split("\t")) for line in text.splitlines()]
