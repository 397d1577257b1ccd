"""That the measurements measure what can run; what they come to is the bench's to say."""

import pytest
import torch

from kernels import bench


def test_every_measurement_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    def once(call, *, graph=False):
        call()
        return 1.0

    monkeypatch.setattr(bench, "seconds", once)
    monkeypatch.setattr(bench, "LAYERS", 2)
    monkeypatch.setattr(bench, "HEADS", 2)
    limits = bench.Ceilings(1e12, 1e15)
    measured = list(bench._measurements([200], requests=2, device=device.type))
    assert [one.name for one in measured] == [
        "window scores, a layer", "selection, a layer's heads", "compaction", "compaction to int8",
        "compaction in place", "growth, a step",
    ]  # fmt: skip
    assert all(one.row(limits)["share_of_floor"] > 0 for one in measured)
    prompt = bench.compression_over_prefill(200, 50, limits, device.type)
    assert prompt["share_of_prefill_floor"] > 0
