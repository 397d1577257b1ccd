"""Where documents come from."""

import random
from typing import Any, NamedTuple

from loadtest.traffic.workloads import Passages


class Source(NamedTuple):
    """document_tokens: how long a document shall be, about."""

    tokenizer: Any
    document_tokens: int
    rng: random.Random

    def passages(self, text: str) -> "Stretches":
        return Stretches(self, Passages(text, self.tokenizer, self.rng))


class Stretches:
    """Stretches of one text."""

    def __init__(self, source: Source, passages: Passages) -> None:
        self._source = source
        self._passages = passages

    def take(self, tokens: int) -> str:
        """About so many tokens from a random line on, with whole lines but the last."""
        return self._source.tokenizer.decode(self._passages.take(tokens)).strip()
