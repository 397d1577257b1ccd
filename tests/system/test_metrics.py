"""The Grafana dashboard against the metrics that a running deployment exports."""

import json
import re

import httpx

from tests.system.deployment import MODEL, ROOT, Deployment, eventually

DASHBOARD = ROOT / "configs" / "grafana" / "adakv.json"


def test_the_dashboard_asks_for_metrics_and_labels_that_exist(deployment: Deployment) -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    asked = " ".join(target["expr"] for panel in dashboard["panels"] for target in panel["targets"])
    names = set(re.findall(r"ray_[a-z_]+", asked))
    assert len(names) >= 6
    body = {"model": MODEL, "prompt": "The lighthouse keeper wrote. " * 150, "max_tokens": 8}
    assert deployment.post("/v1/completions", body).status_code == 200

    def missing() -> set[str]:
        exported = httpx.get(deployment.metrics_url, timeout=30).text
        return names - set(re.findall(r"^(ray_[a-z_]+)\{", exported, re.MULTILINE))

    eventually(lambda: not missing(), 60, f"the dashboard's metrics, of {sorted(names)}")
    lines = httpx.get(deployment.metrics_url, timeout=30).text.splitlines()
    blocks = [line for line in lines if line.startswith("ray_adakv_blocks{")]
    assert all('application="llm"' in line and "replica=" in line for line in blocks)
    states = set(re.findall(r'state="(\w+)"', "\n".join(blocks)))
    assert states == {"free", "compressed", "uncompressed", "reserved_growth"}
