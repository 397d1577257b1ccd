"""Kinds of faults: what each does to a deployment, what it may lose, and how long it may take."""

import random
from typing import NamedTuple

from adakv_serve.loadtest.faults.of_clients import leave, read_slowly, stall
from adakv_serve.loadtest.faults.of_memory import fill_shared_memory
from adakv_serve.loadtest.faults.of_processes import kill_node, kill_raylet, killing, stopping
from adakv_serve.loadtest.faults.of_stores import flush, part, refuse_writes
from adakv_serve.loadtest.faults.scene import Scene, Strike

__all__ = ["KINDS", "Kind", "Scene", "kinds_for", "plan"]

# The time in which a new engine is there on a CPU, while the other one works, and a new node.
_ENGINE_S, _NODE_S = 120.0, 15.0


class Kind(NamedTuple):
    """A kind of fault.

    replaces: the role of the processes of which one has to be started again, if any.
    loses: whether requests may fail by it: those that the lost process worked on.
    serves_within_s: how long after it requests may fail or be slow.
    whole_within_s: how long until everything may be as before.
    nodes: number of nodes that it needs. parts: whether it needs a store behind a proxy.
    """

    strike: Strike
    replaces: str | None = None
    loses: bool = False
    serves_within_s: float = 2.0
    whole_within_s: float = 5.0
    nodes: int = 1
    parts: bool = False


def _of_engine(strike: Strike, role: str, serves_within_s: float, nodes: int = 1) -> Kind:
    """A fault after which an engine has to start, while the other one serves."""
    whole_within_s = _ENGINE_S + serves_within_s + (_NODE_S if nodes > 1 else 0.0)
    return Kind(strike, role, True, serves_within_s, whole_within_s, nodes)


KINDS: dict[str, Kind] = {
    "kill engine": _of_engine(killing("engine"), "engine", 15),
    "pause engine": Kind(stopping("engine", 4)),
    # An engine without an answer is avoided after a third of `replica.hang_s`, and ended after it.
    "hang engine": _of_engine(stopping("engine", 90), "engine", 60),
    "kill replica": _of_engine(killing("replica"), "replica", 15),
    # There is one ingress: until a new one listens, all is refused. It makes the model's renderer,
    # which takes 20 s beside two busy engines on two cores.
    "kill ingress": Kind(killing("ingress"), "ingress", True, 15, 40),
    # Serve looks three times before it starts another.
    "kill HAProxy": Kind(killing("haproxy"), "haproxy", True, 15, 20),
    "kill controller": Kind(killing("controller"), "controller", whole_within_s=15),
    "pause controller": Kind(stopping("controller", 8)),
    "kill Valkey": Kind(killing("valkey"), "valkey"),
    "flush Valkey": Kind(flush),
    "pause Valkey": Kind(stopping("valkey", 5)),
    "read-only Valkey": Kind(refuse_writes),
    "part from Valkey": Kind(part, parts=True),
    "fill /dev/shm": Kind(fill_shared_memory),
    "clients leave": Kind(leave),
    "clients stall": Kind(stall),
    "clients read slowly": Kind(read_slowly),
    "kill raylet": _of_engine(kill_raylet, "replica", 15, nodes=2),
    "kill node": _of_engine(kill_node, "replica", 15, nodes=2),
}


def kinds_for(nodes: int, *, parts: bool) -> list[str]:
    """Return the names of the kinds that a deployment can be struck by.

    Args:
        parts: whether its store is behind a proxy.
    """
    return [
        name for name, kind in KINDS.items() if kind.nodes <= nodes and (parts or not kind.parts)
    ]


def plan(seed: int, names: list[str], count: int) -> list[str]:
    """Return so many faults: all of them in a random order, then all of them in another."""
    rng = random.Random(seed)
    planned: list[str] = []
    while len(planned) < count:
        planned += rng.sample(names, len(names))
    return planned[:count]
