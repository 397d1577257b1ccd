"""Seconds of a worker's steps and of the parts that compression adds, measured on request."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

from torch import Tensor
from vllm.v1.core.sched.output import SchedulerOutput

from adakv_worker.attention.watcher import Watcher

Part = Literal["plan", "compress", "evict"]


class StepTime(NamedTuple):
    """One step of the engine: its seconds in the worker, and what it computed."""

    seconds: float
    prefill_tokens: int
    decodes: int
    preempted: int


class Timings:
    """Seconds of all steps since recording began, and of the parts of our work in them.

    `plan` counts in steps of decodes alone. It includes the start of evictions, as `evict` does.
    """

    def __init__(self, extra_bytes: Callable[[], int], clock: Callable[[], float]) -> None:
        """
        Args:
            extra_bytes: returns the bytes held beside the engine's KV memory.
        """
        self._extra_bytes = extra_bytes
        self._clock = clock
        self._steps: list[StepTime] = []
        self._seconds: dict[Part, float] = {"plan": 0.0, "compress": 0.0, "evict": 0.0}
        self._most_extra_bytes = 0
        self._prefilling = False

    @contextmanager
    def step(self, scheduler_output: SchedulerOutput) -> Iterator[None]:
        """Time the forward pass of a step."""
        counts = scheduler_output.num_scheduled_tokens.values()
        prefill = sum(count for count in counts if count > 1)
        decodes = sum(1 for count in counts if count == 1)
        preempted = len(scheduler_output.preempted_req_ids or ())
        self._prefilling = prefill > 0
        started = self._clock()
        yield
        self._steps.append(StepTime(self._clock() - started, prefill, decodes, preempted))

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Add the seconds of sampling to the step before."""
        started = self._clock()
        yield
        if self._steps:
            step = self._steps[-1]
            self._steps[-1] = step._replace(seconds=step.seconds + self._clock() - started)

    @contextmanager
    def part(self, part: Part) -> Iterator[None]:
        """Add the seconds of a part of our work."""
        started = self._clock()
        yield
        if part != "plan" or not self._prefilling:
            self._seconds[part] += self._clock() - started
        self._most_extra_bytes = max(self._most_extra_bytes, self._extra_bytes())

    def figures(self) -> dict[str, object]:
        """Return everything as plain values, which any executor can send."""
        return {
            "steps": [tuple(step) for step in self._steps],
            **{f"{part}_s": seconds for part, seconds in self._seconds.items()},
            "extra_bytes": self._most_extra_bytes,
        }


class TimedWatcher(NamedTuple):
    """Passes a layer on to a watcher and times it as a part."""

    watcher: Watcher
    timings: Timings
    part: Part

    def see(self, layer: int, query: Tensor) -> None:
        with self.timings.part(self.part):
            self.watcher.see(layer, query)


def wall_clock() -> float:
    return time.perf_counter()
