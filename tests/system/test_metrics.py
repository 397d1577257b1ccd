"""The Grafana dashboard against the metrics that a running deployment exports."""

import re

import httpx

from tests.system.deployment import MODEL, Deployment, dashboard_metrics
from tests.waiting import eventually


def test_the_dashboard_asks_for_metrics_and_labels_that_exist(deployment: Deployment) -> None:
    # What tells of moves and of sessions comes with the first one.
    later = "spill|recomputed|sessions_total|resumed|session_move"
    names = {name for name in dashboard_metrics() if not re.search(later, name)}
    assert len(names) >= 6
    body = {"model": MODEL, "prompt": "The lighthouse keeper wrote. " * 150, "max_tokens": 8}
    assert deployment.post("/v1/completions", body).status_code == 200

    eventually(
        lambda: names <= deployment.metric_names(), 60, f"the dashboard's metrics, {sorted(names)}"
    )
    lines = httpx.get(deployment.metrics_url, timeout=30).text.splitlines()
    blocks = [line for line in lines if line.startswith("ray_adakv_blocks{")]
    assert all('application="llm"' in line and "replica=" in line for line in blocks)
    states = set(re.findall(r'state="(\w+)"', "\n".join(blocks)))
    assert states == {
        "free", "compressed", "uncompressed", "reserved_growth", "lent", "borrowed"
    }  # fmt: skip
