"""Where the time of decode steps goes: the GPU's share, its kernels, the host's functions."""

import cProfile
import pstats
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_MOST_ROWS = 15


class Span(NamedTuple):
    """What the GPU ran, and from when to when, in microseconds."""

    name: str
    start_us: float
    end_us: float


def busy_us(spans: Iterable[Span]) -> float:
    """Return how long at least one of the spans ran, in microseconds."""
    busy = 0.0
    until = float("-inf")
    for span in sorted(spans, key=lambda span: span.start_us):
        busy += max(0.0, span.end_us - max(span.start_us, until))
        until = max(until, span.end_us)
    return busy


def profile_steps(step: Callable[[], object], count: int) -> dict[str, Any]:
    """Take a multiple of `count` steps, and return the seconds of one and what they are made of.

    The seconds are of steps without a profiler. `gpu_busy_s` is what the GPU computed in as many
    others, `kernels` its longest kernels, `host` the functions in which the host spent most time of
    its own, each in seconds of one step.
    """
    seconds = _seconds(step, count)
    spans = _gpu_spans(step, count)
    by_kernel: dict[str, float] = defaultdict(float)
    for span in spans:
        by_kernel[span.name[:80]] += (span.end_us - span.start_us) / 1e6 / count
    gpu_busy_s = busy_us(spans) / 1e6 / count
    return {
        "step_s": seconds,
        "gpu_busy_s": gpu_busy_s,
        "gpu_busy_share": gpu_busy_s / seconds,
        "kernels": dict(sorted(by_kernel.items(), key=lambda item: -item[1])[:_MOST_ROWS]),
        "host": _host_functions(step, count),
    }


def _seconds(step: Callable[[], object], count: int) -> float:
    _wait_for_gpu()
    started = time.perf_counter()
    for _ in range(count):
        step()
    _wait_for_gpu()
    return (time.perf_counter() - started) / count


def _gpu_spans(step: Callable[[], object], count: int) -> list[Span]:
    if not torch.cuda.is_available():
        return []
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            step()
        _wait_for_gpu()
    return [
        Span(event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == DeviceType.CUDA
    ]


def _host_functions(step: Callable[[], object], count: int) -> dict[str, float]:
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(count):
        step()
    profiler.disable()
    stats: Any = pstats.Stats(profiler)
    own = {
        f"{'/'.join(file.split('/')[-2:])}:{line} {name}": row[2] / count
        for (file, line, name), row in stats.stats.items()
    }
    return dict(sorted(own.items(), key=lambda item: -item[1])[: 2 * _MOST_ROWS])


def _wait_for_gpu() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
