"""The order in which arms take turns."""

from collections.abc import Iterable
from typing import NamedTuple


class Turn(NamedTuple):
    """One repetition of one arm."""

    repetition: int
    arm: str


def turns(arms: Iterable[str], repetitions: int) -> list[Turn]:
    """Return A B, B A, A B …: what the machine gains or loses over time falls on all arms."""
    names = list(arms)
    return [
        Turn(repetition, arm)
        for repetition in range(repetitions)
        for arm in (names if repetition % 2 == 0 else names[::-1])
    ]
