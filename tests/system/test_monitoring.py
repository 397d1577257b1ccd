"""Prometheus as `make monitoring` runs it, beside a running deployment."""

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from adakv_serve.loadtest.servers.ports import free_port
from tests.system.deployment import MODEL, ROOT, Deployment
from tests.waiting import eventually

pytestmark = pytest.mark.skipif(shutil.which("prometheus") is None, reason="no prometheus here")

# What an engine first has to do, or a fault.
_LATER = {"ray_vllm_num_preemptions_total"}

Query = Callable[[str], Any]


@pytest.fixture
def query(deployment: Deployment, tmp_path: Path) -> Iterator[Query]:
    # Ray's dashboard, which these tests do without, writes it.
    targets = [{"targets": [deployment.metrics_url.split("/")[2]], "labels": {"job": "ray"}}]
    discovered = deployment.folder / "ray" / "prom_metrics_service_discovery.json"
    discovered.write_text(json.dumps(targets))
    port = free_port()
    settings = {
        "PROMETHEUS_PORT": str(port),
        "MONITORING_DATA": str(tmp_path),
        "RAY_TMPDIR": str(deployment.folder),
    }
    process = psutil.Popen(
        ["make", "--no-print-directory", "monitoring"], cwd=ROOT, env={**os.environ, **settings},
        stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, start_new_session=True,
    )  # fmt: skip

    def query(path: str) -> Any:
        try:
            answer = httpx.get(f"http://127.0.0.1:{port}/api/v1/{path}", timeout=10)
        except httpx.HTTPError:
            return None
        return answer.json()["data"] if answer.status_code == 200 else None

    try:
        yield query
    finally:
        family = [process, *process.children(recursive=True)]
        # As Ctrl-C in a terminal, to all of them.
        os.killpg(process.pid, signal.SIGINT)
        _, left = psutil.wait_procs(family, timeout=60)
        for one in left:
            one.kill()
    assert not left, f"still there after Ctrl-C: {left}"


def test_it_has_the_replicas_memory_and_its_alerts_can_be_computed(
    deployment: Deployment, query: Query
) -> None:
    body = {"model": MODEL, "prompt": "The lighthouse keeper wrote. " * 150, "max_tokens": 8}
    assert deployment.post("/v1/completions", body).status_code == 200

    def replicas() -> set[str]:
        found = query('query?query=ray_adakv_blocks{state="free"}')
        return {one["metric"]["replica"] for one in found["result"]} if found else set()

    eventually(lambda: replicas() == set(deployment.occupancy()), 120, "both replicas' memory")
    configured = (ROOT / "configs" / "monitoring" / "alerts.yml").read_text()
    asked = set(re.findall(r"\bray_(?!io_)[a-z_]+", configured)) - _LATER
    eventually(lambda: asked <= set(query("label/__name__/values") or ()), 120, f"{sorted(asked)}")

    def computed() -> list[dict[str, Any]]:
        (group,) = query("rules")["groups"]
        return group["rules"] if all(one["health"] == "ok" for one in group["rules"]) else []

    rules = eventually(computed, 60, "all alerts computed")
    assert [one["name"] for one in rules if one["state"] == "firing"] == []
