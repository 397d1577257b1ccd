"""The order in which the arms of a comparison run."""

from collections.abc import Iterable
from typing import NamedTuple


class Unit(NamedTuple):
    """One repetition of one arm."""

    repetition: int
    arm: str


def interleaved(arms: Iterable[str], repetitions: int) -> list[Unit]:
    """Return A B, B A, A B …: what the machine gains or loses over time falls on all arms."""
    names = list(arms)
    return [
        Unit(repetition, arm)
        for repetition in range(repetitions)
        for arm in (names if repetition % 2 == 0 else names[::-1])
    ]
