"""Seeded traces of requests: their arrivals, lengths and shared prefixes."""

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

BLOCK_SIZE_TOKENS = 32
MAX_MODEL_TOKENS = 8192


class Request(NamedTuple):
    """One request. block_hashes: hashes of the prompt's full blocks, equal for equal prefixes."""

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...]


class Shape(NamedTuple):
    """Log-normal lengths of a trace as (median tokens, sigma), cut to the model's context."""

    prompt: tuple[float, float]
    output: tuple[float, float]
    turns: int = 1
    burst: int = 1


SHAPES = {
    "poisson": Shape((800, 0.4), (150, 0.5)),
    "bursty": Shape((800, 0.4), (150, 0.5), burst=6),
    "long_tail": Shape((500, 1.2), (120, 0.8)),
    "multi_turn": Shape((300, 0.6), (120, 0.5), turns=5),
}


def trace(name: str, count: int, rate_per_s: float, seed: int) -> list[Request]:
    """Return `count` requests at a mean rate, by time of arrival.

    In `bursty` they arrive in groups. In `multi_turn` each is a turn of a conversation, with the
    history as the prompt's prefix and some ten seconds between turns.
    """
    shape = SHAPES[name]
    rng = random.Random(f"{name}/{seed}")
    groups = math.ceil(count / (shape.turns * shape.burst))
    gap_s = shape.turns * shape.burst / rate_per_s
    requests: list[Request] = []
    at = 0.0
    for group in range(groups):
        at += rng.expovariate(1 / gap_s)
        for member in range(shape.burst):
            requests.extend(_conversation(shape, at, (seed, group, member), rng))
    requests.sort()
    return requests[:count]


def _conversation(
    shape: Shape, at: float, identity: tuple[int, ...], rng: random.Random
) -> Iterator[Request]:
    history = 0
    for _ in range(shape.turns):
        fresh = _length(shape.prompt, rng)
        output = min(_length(shape.output, rng), 1000)
        prompt = min(history + fresh, MAX_MODEL_TOKENS - output)
        blocks = tuple(hash((identity, block)) for block in range(prompt // BLOCK_SIZE_TOKENS))
        yield Request(at, prompt, output, blocks)
        history = prompt + output
        at += 5 + rng.expovariate(1 / 10)


def _length(distribution: tuple[float, float], rng: random.Random) -> int:
    median, sigma = distribution
    return round(min(max(rng.lognormvariate(math.log(median), sigma), 16), 7000))
