import json
from pathlib import Path

import pytest

from adakv_serve.router.store_bench import main


def test_a_small_fleet_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "figures.json"
    assert main(["--replicas", "3", "--seconds", "0.5", "--json", str(path)]) == 0
    (cost,) = json.loads(path.read_text())
    assert cost["replicas"] == 3
    assert cost["commands_per_s"] > cost["reports_per_s"] > 0
    assert cost["ingress_share"] > 0
    assert "commands/s" in capsys.readouterr().out
