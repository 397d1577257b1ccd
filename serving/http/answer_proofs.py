"""The proofs of compression of one HTTP answer: each choice's own, and their summary."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from adakv_worker.messages import Proof

# Stands in a summary where the choices differ in something that has no mean.
MIXED = "mixed"


class AnswerProofs:
    """Collects the proofs of one HTTP answer, the latest of each choice.

    The choices of several prompts are numbered on, as in OpenAI's `choices`.
    """

    def __init__(self) -> None:
        self._choices: dict[str, int] = {}
        self._proofs: dict[tuple[str, int], Proof] = {}

    def expect(self, request_id: str, choices: int) -> None:
        """Register the next prompt, which the engine names `request_id`."""
        self._choices[request_id] = choices

    def note(self, request_id: str, choice: int, proof: Proof) -> None:
        """Keep a proof of one of the prompt's choices; it replaces an earlier one."""
        self._proofs[request_id, choice] = proof

    def of_choice(self, index: int) -> dict[str, Any] | None:
        """Return the JSON of a choice's proof, None if there is none yet."""
        for request_id, choices in self._choices.items():
            if index < choices:
                proof = self._proofs.get((request_id, index))
                return None if proof is None else proof.as_json()
            index -= choices
        return None

    def summary(self) -> dict[str, Any] | None:
        """Return the JSON of one proof for all choices together, None if there is none yet."""
        return summary([*self._proofs.values()])


def summary(proofs: list[Proof]) -> dict[str, Any] | None:
    """Summarize proofs as JSON under the same keys; a single one is its own summary.

    What all agree in stays. Other numbers become their mean, so that the ratios between them hold,
    but `..._min` the least and `..._max` the greatest. Anything else becomes `MIXED`.
    """
    if not proofs:
        return None
    first, *others = [proof.as_json() for proof in proofs]
    return {key: _merged(key, [first[key], *(o[key] for o in others)]) for key in first}


def _merged(key: str, values: list[Any]) -> Any:
    first = values[0]
    if all(value == first for value in values):
        return first
    if not all(isinstance(value, (int, float)) for value in values):
        return MIXED
    if key.endswith("_min"):
        return min(values)
    if key.endswith("_max"):
        return max(values)
    mean = round(sum(values) / len(values), 3)
    whole = mean.is_integer() and all(isinstance(value, int) for value in values)
    return int(mean) if whole else mean


_current: ContextVar[AnswerProofs | None] = ContextVar("adakv_answer_proofs", default=None)


def current_answer() -> AnswerProofs | None:
    """Return the answer that this task works on, None outside of one."""
    return _current.get()


@contextmanager
def answering() -> Iterator[AnswerProofs]:
    """Make a new answer the current one, for this task and those that it starts."""
    proofs = AnswerProofs()
    token = _current.set(proofs)
    try:
        yield proofs
    finally:
        _current.reset(token)
