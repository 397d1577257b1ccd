import json
from pathlib import Path

import pytest

from adakv_serve.router.bench import main


def test_the_benchmark_writes_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "figures.json"
    assert main(["--decisions", "50", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    for name in ("decision_p50_ms", "decision_p99_ms"):
        assert set(figures[name]) == {"8", "64", "1000"}
    assert figures["added_rss_mib_1000"] > 0
    assert "1000 replicas: a decision takes p50" in capsys.readouterr().out
