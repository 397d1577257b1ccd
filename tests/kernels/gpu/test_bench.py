"""Every measurement of the bench runs."""

from collections.abc import Callable

import torch

from adakv_serve.kernels.bench import Bench, Ceilings


def once(call: Callable[[], object], *, graph: bool = False) -> float:
    call()
    return 1.0


def test_every_measurement_runs(device: torch.device) -> None:
    limits = Ceilings(1e12, 1e15)
    bench = Bench(device.type, layers=2, heads=2, timer=once)
    measured = list(bench.measurements([200], requests=2))
    assert [one.name for one in measured] == [
        "window scores, a layer", "selection, a layer's heads", "compaction",
        "compaction in place", "growth, a step",
    ]  # fmt: skip
    assert all(one.share_of_floor(limits) > 0 for one in measured)
    assert bench.prompt_cost(200, 50, limits).share_of_prefill_floor > 0
