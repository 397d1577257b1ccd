"""What answers: an engine in this process, or a server over HTTP."""

from collections.abc import Iterable
from typing import Any, Protocol

from evals.choice import Choice, Outcome
from evals.samples import Sample, Tokens


class Answering(Protocol):
    """Something that answers: what it is made to say, and what it says by itself."""

    @property
    def tokenizer(self) -> Any: ...

    def outcomes(
        self, sample: Sample, tokens: Tokens, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]: ...

    def answers(
        self, prompt: list[int], begin: list[int], max_tokens: int, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]: ...
