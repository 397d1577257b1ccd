"""Source of documents."""

import random
from typing import Any, NamedTuple

from adakv_serve.loadtest.traffic.workloads import Passages


class Source(NamedTuple):
    """Settings that tasks make documents from.

    document_tokens: approximate length of a document.
    """

    tokenizer: Any
    document_tokens: int
    rng: random.Random

    def passages(self, text: str) -> "DecodedPassages":
        """Return random passages of a text."""
        return DecodedPassages(self, Passages(text, self.tokenizer, self.rng))


class DecodedPassages:
    """Random passages of one text."""

    def __init__(self, source: Source, passages: Passages) -> None:
        self._source = source
        self._passages = passages

    def take(self, tokens: int) -> str:
        """Return about `tokens` tokens from a random line on, whole lines but the last."""
        return self._source.tokenizer.decode(self._passages.take(tokens)).strip()
