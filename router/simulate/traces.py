"""Seeded traces of requests (arrivals, lengths, prefixes), and what their fleets are like."""

import math
import random
from collections.abc import Iterator
from typing import NamedTuple

BLOCK_SIZE_TOKENS = 32
MAX_MODEL_TOKENS = 8192


class Request(NamedTuple):
    """One request.

    block_hashes: hashes of the prompt's full blocks, equal for equal prefixes.
    compressed: whether its cache is compressed; otherwise it asks for the whole one.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...]
    compressed: bool = True


class Shape(NamedTuple):
    """Log-normal lengths as (median tokens, sigma), cut to the model's context.

    turns: turns of a conversation. burst: conversations that begin at once.
    shared_tokens, shared: length of a prefix that this share of the conversations has in common.
    uncompressed: share of the conversations that are not compressed.
    """

    prompt: tuple[float, float]
    output: tuple[float, float]
    turns: int = 1
    burst: int = 1
    shared_tokens: int = 0
    shared: float = 0.0
    uncompressed: float = 0.0


class Scenario(NamedTuple):
    """What arrives, and what the fleet is like.

    shapes: each conversation has one of these.
    slowdown: how much slower the first replica is than the others.
    joins: whether the last replica joins after a third of the requests, with nothing cached.
    late_reports: whether a report shows a request only after the step that runs when it arrives,
        as an engine's own figures do.
    """

    shapes: tuple[Shape, ...]
    slowdown: float = 1.0
    joins: bool = False
    late_reports: bool = False


_PLAIN = Shape((800, 0.4), (150, 0.5))
_TALK = Shape((300, 0.6), (120, 0.5), turns=5)
SCENARIOS = {
    "poisson": Scenario((_PLAIN,)),
    "bursty": Scenario((_PLAIN._replace(burst=6),)),
    "long_tail": Scenario((Shape((500, 1.2), (120, 0.8)),)),
    "multi_turn": Scenario((_TALK,)),
    # Coding agents: short outputs on a context that grows by the results of tools.
    "agent": Scenario((Shape((400, 0.8), (60, 0.6), turns=20),)),
    # Chats, documents and completions of code.
    "mixed_lengths": Scenario(
        (_TALK, Shape((4000, 0.3), (100, 0.5)), Shape((900, 0.4), (20, 0.4)))
    ),
    "hot_prefix": Scenario((Shape((250, 0.5), (120, 0.5), shared_tokens=1536, shared=0.7),)),
    "mixed_compression": Scenario((Shape((1500, 0.6), (150, 0.5), uncompressed=0.5),)),
    "slow_replica": Scenario((_TALK,), slowdown=2.5),
    "joins_cold": Scenario((_TALK,), joins=True),
    "late_reports": Scenario((_PLAIN._replace(burst=6),), late_reports=True),
}


def trace(name: str, count: int, rate_per_s: float, seed: int) -> list[Request]:
    """Return `count` requests of a scenario at a mean rate, by time of arrival.

    In `bursty` they arrive in groups. In `multi_turn` each is a turn of a conversation, with the
    history as the prompt's prefix and some ten seconds between turns.
    """
    shapes = SCENARIOS[name].shapes
    rng = random.Random(f"{name}/{seed}")
    turns = sum(shape.turns for shape in shapes) / len(shapes)
    bursts = max(shape.burst for shape in shapes)
    gap_s = turns * bursts / rate_per_s
    requests: list[Request] = []
    at = 0.0
    group = 0
    while len(requests) < count or group * turns * bursts < count:
        at += rng.expovariate(1 / gap_s)
        shape = shapes[0] if len(shapes) == 1 else rng.choice(shapes)
        for member in range(shape.burst):
            requests.extend(_conversation(shape, at, (seed, group, member), rng))
        group += 1
    requests.sort()
    return requests[:count]


def _conversation(
    shape: Shape, at: float, identity: tuple[int, ...], rng: random.Random
) -> Iterator[Request]:
    # Draws that other shapes do not need would change their traces.
    is_shared = shape.shared > 0 and rng.random() < shape.shared
    compressed = shape.uncompressed == 0 or rng.random() >= shape.uncompressed
    history = shape.shared_tokens if is_shared else 0
    common = history // BLOCK_SIZE_TOKENS
    for _ in range(shape.turns):
        fresh = _length(shape.prompt, rng)
        output = min(_length(shape.output, rng), 1000)
        prompt = min(history + fresh, MAX_MODEL_TOKENS - output)
        blocks = tuple(
            hash(((-1,), block) if block < common else (identity, block))
            for block in range(prompt // BLOCK_SIZE_TOKENS)
        )
        yield Request(at, prompt, output, blocks, compressed)
        history = prompt + output
        at += 5 + rng.expovariate(1 / 10)


def _length(distribution: tuple[float, float], rng: random.Random) -> int:
    median, sigma = distribution
    return round(min(max(rng.lognormvariate(math.log(median), sigma), 16), 7000))
