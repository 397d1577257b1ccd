"""The routers to compare. Each reads only what it could read of a real fleet."""

import random
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Protocol

from adakv_serve.router.chooser import Chooser
from adakv_serve.router.footprint import Budget, OutputQuantiles, predict
from adakv_serve.router.ledger.occupancy import SCHEMA_MAJOR, SCHEMA_MINOR, Occupancy
from adakv_serve.router.local_view import LocalView
from adakv_serve.router.score import Speeds
from adakv_serve.router.simulate.replica import ServiceTimes, SimulatedReplica
from adakv_serve.router.simulate.traces import BLOCK_SIZE_TOKENS, Request
from adakv_serve.router.simulate.yardsticks import Dynamo, LlmD

# Reports never expire: a simulated replica reports changes only.
_FOREVER_S = 1e12


class Router(Protocol):
    def choose(self, request: Request, now_s: float) -> int: ...

    def report(self, index: int, now_s: float) -> None:
        """Take the occupancy report of a replica, which may have joined the fleet."""
        ...


class _Blind:
    """Router without reports, which looks at queue lengths as Ray Serve does."""

    def __init__(
        self,
        fleet: Sequence[SimulatedReplica],
        rng: random.Random,
        pick: Callable[[random.Random, Sequence[SimulatedReplica], int], int],
    ) -> None:
        self._fleet, self._rng, self._pick = fleet, rng, pick
        self._count = -1

    def choose(self, request: Request, now_s: float) -> int:
        self._count += 1
        return self._pick(self._rng, self._fleet, self._count)

    def report(self, index: int, now_s: float) -> None:
        pass


def _shortest(rng: random.Random, fleet: Sequence[SimulatedReplica], indices: Sequence[int]) -> int:
    return min(indices, key=lambda index: (fleet[index].ongoing, rng.random()))


_BLIND: dict[str, Callable[[random.Random, Sequence[SimulatedReplica], int], int]] = {
    "random": lambda rng, fleet, count: rng.randrange(len(fleet)),
    "round_robin": lambda rng, fleet, count: count % len(fleet),
    "power_of_two": lambda rng, fleet, count: _shortest(
        rng, fleet, rng.sample(range(len(fleet)), min(2, len(fleet)))
    ),
    "least_queue": lambda rng, fleet, count: _shortest(rng, fleet, range(len(fleet))),
}
# `dynamo` needs an optional package.
_DYNAMO = ("dynamo",) if find_spec("dynamo") else ()
ROUTERS = (*_BLIND, "least_occupancy", "llm_d", *_DYNAMO, "ours")


class _LeastOccupancy:
    """Router to the replica with the most free blocks by the last reports."""

    def __init__(self, fleet: Sequence[SimulatedReplica], rng: random.Random) -> None:
        self._fleet, self._rng = fleet, rng
        self._free: dict[int, int] = {}
        for index in range(len(fleet)):
            self.report(index, 0.0)

    def choose(self, request: Request, now_s: float) -> int:
        free = self._free
        return max(free, key=lambda index: (free[index], self._rng.random()))

    def report(self, index: int, now_s: float) -> None:
        self._free[index] = self._fleet[index].free_blocks


class Ours:
    """The real chooser and view, fed with reports of the simulated replicas.

    It expects outputs by their quantiles and does not see a request's own output length.
    """

    def __init__(
        self,
        fleet: Sequence[SimulatedReplica],
        rng: random.Random,
        times: ServiceTimes,
        budget: Budget | None,
    ) -> None:
        self._fleet, self._budget, self._times = fleet, budget, times
        speeds = Speeds(
            times.prefill_tokens_per_s, times.decode_step_s, times.decode_step_s_per_request
        )
        view = LocalView(_FOREVER_S, speeds)
        self._chooser = Chooser(view, speeds, BLOCK_SIZE_TOKENS, rng)
        self._ids: list[str] = []
        self._index: dict[str, int] = {}
        self._outputs = OutputQuantiles()
        self._sequence = self._chosen = 0
        # Time and computed tokens at each replica's last report.
        self._reported: dict[int, tuple[float, int, int, int]] = {}
        for index in range(len(fleet)):
            self.report(index, 0.0)

    def choose(self, request: Request, now_s: float) -> int:
        expected = self._outputs.expected(None)
        budget = self._budget if request.compressed else None
        footprint = predict(
            request.prompt_tokens, expected, budget, BLOCK_SIZE_TOKENS, request.block_hashes
        )
        self._chosen += 1
        decision = self._chooser.choose(self._chosen, self._ids, footprint, now_s)
        assert decision is not None
        best = decision.replica_ids[0]
        self._chooser.sent(self._chosen, best, footprint, now_s)
        # An ingress notes outputs a little later, from the same distribution.
        self._outputs.note(request.output_tokens)
        return self._index[best]

    def leave(self, index: int) -> None:
        """Choose a replica no more."""
        if (replica_id := self._fleet[index].replica_id) in self._ids:
            self._ids.remove(replica_id)
            self._chooser.retain(self._ids)

    def report(self, index: int, now_s: float) -> None:
        replica = self._fleet[index]
        if replica.replica_id not in self._index:
            self._index[replica.replica_id] = index
            self._ids.append(replica.replica_id)
        self._sequence += 1
        prefilled, decoded, steps = self._speeds_of(index, now_s)
        total = self._times.blocks_total
        self._chooser.view.accept(
            Occupancy.model_construct(
                schema_major=SCHEMA_MAJOR,
                schema_minor=SCHEMA_MINOR,
                replica_id=replica.replica_id,
                model="simulated",
                epoch=0,
                sequence=self._sequence,
                block_size_tokens=BLOCK_SIZE_TOKENS,
                blocks_total=total,
                blocks_free=max(0, replica.free_blocks),
                blocks_reserved_growth=replica.growth_blocks,
                running=len(replica.running),
                waiting=len(replica.waiting),
                waiting_blocks=replica.waiting_blocks,
                prefill_tokens_queued=replica.prefill_tokens,
                prefill_tokens_per_s=prefilled,
                decode_tokens_per_s=decoded,
                decode_steps_per_s=steps,
            ),
            now_s,
        )

    def _speeds_of(self, index: int, now_s: float) -> tuple[float, float, float]:
        """Return the tokens and steps per second since the replica's last report."""
        replica = self._fleet[index]
        at_s, *before = self._reported.get(index, (0.0, 0, 0, 0))
        now = replica.prefilled_tokens, replica.decoded_tokens, replica.decode_steps
        self._reported[index] = (now_s, *now)
        gap_s = max(now_s - at_s, 1e-6)
        prefilled, decoded, steps = (
            (count - last) / gap_s for count, last in zip(now, before, strict=True)
        )
        return prefilled, decoded, steps


def make_router(
    name: str,
    fleet: Sequence[SimulatedReplica],
    rng: random.Random,
    times: ServiceTimes,
    budget: Budget | None,
) -> Router:
    """Return the router of that name, one of `ROUTERS`."""
    if name == "llm_d":
        return LlmD(fleet, rng, times.blocks_total)
    if name == "dynamo":
        return Dynamo(fleet, times.blocks_total)
    if name == "ours":
        return Ours(fleet, rng, times, budget)
    if name == "least_occupancy":
        return _LeastOccupancy(fleet, rng)
    return _Blind(fleet, rng, _BLIND[name])
