"""The alerts, by the program that comes with Prometheus, and what `make monitoring` says."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs" / "monitoring"

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="no prometheus here")


def _promtool(*arguments: str) -> str:
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_prometheus_takes_the_configuration() -> None:
    assert "rules found" in _promtool("check", "config", str(CONFIGS / "prometheus.yml"))


@needs_promtool
def test_alerts_fire_for_their_faults_and_not_for_a_deployment_at_work() -> None:
    _promtool("test", "rules", str(Path(__file__).parent / "alerts.yaml"))


def test_the_dashboard_asks_for_one_application_of_one_release() -> None:
    dashboard = json.loads((CONFIGS / "grafana" / "adakv.json").read_text())
    chosen = 'namespace=~"$namespace",ray_io_cluster=~"$cluster",application="$application"'
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            metrics = re.findall(r"\bray_(?!io_)[a-z_]+", target["expr"])
            assert target["expr"].count(chosen) == len(metrics), target["expr"]
    # Outside of Kubernetes metrics lack both labels, which all that is chosen at first matches.
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    for name in ("namespace", "cluster"):
        assert (variables[name]["current"]["value"], variables[name]["allValue"]) == (
            "$__all",
            ".*",
        )


def test_without_prometheus_it_says_how_to_get_it(tmp_path: Path) -> None:
    for name in ("bash", "env", "dirname"):
        (tmp_path / name).symlink_to(shutil.which(name) or name)
    done = subprocess.run(
        [ROOT / "scripts" / "monitoring"],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "apt-get install prometheus" in done.stderr
    assert len(done.stderr.splitlines()) == 1
