"""States of a request that can move between engines, and the transition function over them."""

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

from vllm.v1.engine import EngineCoreOutput

Outputs = tuple[EngineCoreOutput, ...]


class Place(Enum):
    """Where a request is while it is not leaving."""

    HERE = auto()
    AWAY = auto()
    ENDED = auto()


@dataclass(frozen=True)
class Leaving:
    """A request whose cache is being written, or whose stream is catching up with it.

    held: outputs of this engine that the front end has not got.
    missing: tokens of the cache that the stream lacks; None until the cache is written.
    """

    held: Outputs = ()
    missing: int | None = None

    @property
    def has_caught_up(self) -> bool:
        return self.missing is not None and self.missing <= 0


State = Place | Leaving


class Signal(Enum):
    """Events without content."""

    ASKED_TO_LEAVE = auto()
    LEFT = auto()
    STAYED = auto()
    CAME_BACK = auto()
    CANCELLED = auto()


@dataclass(frozen=True)
class Exported:
    """The cache is written; the stream lacks `missing` of its tokens."""

    missing: int


@dataclass(frozen=True)
class DecodedHere:
    outputs: Outputs


@dataclass(frozen=True)
class DecodedAway:
    outputs: Outputs


Event = Signal | Exported | DecodedHere | DecodedAway


class Transition(NamedTuple):
    """The next state, and the outputs that the front end gets now, in order."""

    state: State
    outputs: Outputs = ()


def transition(state: State, event: Event) -> Transition:
    """Return the next state. An event that has no case for a state changes nothing.

    A request that leaves goes on elsewhere after the last token of its cache. So the front end
    gets this engine's outputs up to that token; later ones are dropped.
    """
    match state, event:
        case _, Signal.CANCELLED:
            return Transition(Place.ENDED)
        case (Place.HERE, DecodedHere(outputs)) | (Place.AWAY, DecodedAway(outputs)):
            return _hand_on(state, outputs)
        case Place.HERE, Signal.ASKED_TO_LEAVE:
            return Transition(Leaving())
        case Leaving(held, missing), DecodedHere(outputs):
            return _catch_up((*held, *outputs), missing)
        case Leaving(held, _), Exported(missing):
            return _catch_up(held, missing)
        case Leaving(has_caught_up=True), Signal.LEFT:
            return Transition(Place.AWAY)
        case Leaving(held, _), Signal.STAYED:
            return _hand_on(Place.HERE, held)
        case Place.AWAY, Signal.CAME_BACK:
            return Transition(Place.HERE)
    return Transition(state)


def _catch_up(held: Outputs, missing: int | None) -> Transition:
    """Hand on held outputs until the stream has all tokens of the cache."""
    count = 0
    while missing is not None and missing > 0 and count < len(held):
        missing -= len(held[count].new_token_ids)
        count += 1
    return _hand_on(Leaving(held[count:], missing), held[:count])


def _hand_on(state: State, outputs: Outputs) -> Transition:
    is_complete = any(output.finished for output in outputs)
    return Transition(Place.ENDED if is_complete else state, outputs)
