"""`make serve` as a newcomer runs it: its own Ray, no key; and a fleet that grows and shrinks.

Its paths begin with a route prefix.
"""

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import openai
import psutil
import pytest
import yaml

from adakv_serve.loadtest.autoscaling import Phases, drive
from adakv_serve.loadtest.servers.occupancy import occupancy_watch
from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.router.ledger.redis_ledger import LedgerKeys, LedgerReader
from adakv_serve.router.stores import full_url
from adakv_serve.serving.models.embedded import embedded_model_path
from tests.system.deployment import ROOT
from tests.waiting import eventually

pytestmark = pytest.mark.slow


class Served(NamedTuple):
    base_url: str
    store_url: str


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("make_serve")
    http_port, store_port = free_port(), free_port()
    config = yaml.safe_load((ROOT / "configs" / "autoscale.yaml").read_text())
    config["http_options"]["port"] = http_port
    application = config["applications"][0]
    application["route_prefix"] = "/small"
    application["args"]["store"] = {"port": store_port}
    application["args"]["model"] = {"path": str(embedded_model_path()), "name": "mine"}
    scaling = application["deployments"][0]["autoscaling_config"]
    scaling |= {"min_replicas": 0, "initial_replicas": 1, "max_replicas": 2, "downscale_delay_s": 5}
    # Low enough for ten clients to reach on any machine.
    targets = {"target_occupancy": 0.4, "target_wait_s": 2, "keep_s": 10}
    scaling["policy"]["policy_kwargs"] |= targets
    path, log = folder / "cluster.yaml", folder / "log"
    path.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{http_port}/small"
    process = _make_serve(path, log)
    try:
        try:
            eventually(lambda: _is_healthy(url, process), 300, "`make serve`")
        except AssertionError:
            print(_end_of(log))
            raise
        yield Served(url, f"redis://127.0.0.1:{store_port}")
        family = [process, *process.children(recursive=True)]
        _end_while_it_answers(url, process)
        _, left = psutil.wait_procs(family, timeout=60)
        assert not left, f"still there a minute after SIGTERM: {left}"
    finally:
        for one in [*process.children(recursive=True), process] if process.is_running() else []:
            one.kill()


def _end_while_it_answers(url: str, process: psutil.Popen) -> None:
    """Send SIGTERM, as supervisors do to a service's processes; the answer is whole.

    `make` passes it on, so that its child gets it twice.
    """
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    stream = client.completions.create(
        model="mine", prompt="Once", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
    )
    next(stream)
    for one in [process, *process.children()]:
        one.send_signal(signal.SIGTERM)
    *_, last = stream
    assert last.choices[0].finish_reason == "length"


def _make_serve(config: Path, log: Path) -> psutil.Popen:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with log.open("wb") as file:
        return psutil.Popen(
            ["make", "serve", f"CONFIG={config}"],
            cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
            start_new_session=True, preexec_fn=_heed_ctrl_c,
        )  # fmt: skip


def _heed_ctrl_c() -> None:
    """Undo what a shell sets for its background jobs: they ignore SIGINT, and so do children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _is_healthy(url: str, process: psutil.Popen) -> bool:
    assert process.poll() is None, "it ended"
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def _end_of(log: Path) -> str:
    return log.read_text(errors="replace")[-4000:]


def test_a_model_from_a_folder_answers_without_a_key(served: Served) -> None:
    client = openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == ["mine"]
    answer = client.chat.completions.create(
        model="mine", messages=[{"role": "user", "content": "Hello"}], max_tokens=8
    )
    assert answer.choices[0].message.content


async def _load(served: Served, phases: Phases) -> dict[str, Any]:
    async with (
        httpx.AsyncClient(base_url=served.base_url, timeout=300) as client,
        occupancy_watch(served.store_url, "llm", interval_s=0.5) as watch,
    ):
        return await drive(client, watch, phases)


@pytest.mark.long
def test_the_fleet_grows_under_load_and_shrinks_without(served: Served) -> None:
    result = asyncio.run(_load(served, Phases(clients=10, high_s=90, limit_s=400)))
    assert result["failed"] == []
    assert result["most_replicas"] == 2
    assert result["last_replicas"] == 1


@pytest.mark.long
def test_probes_leave_a_fleet_at_zero_and_a_request_brings_it_back(served: Served) -> None:
    ledger = LedgerReader(full_url(served.store_url), LedgerKeys("adakv", "llm"))

    def live() -> int:
        return len(ledger.read().reports)

    eventually(lambda: live() == 0, 120, "an idle fleet at zero")
    # Serve starts a replica within seconds of a request. Nothing tells that none came.
    end_s = time.monotonic() + 15
    while time.monotonic() < end_s:
        assert httpx.get(f"{served.base_url}/health", timeout=60).status_code == 200
        assert live() == 0
        time.sleep(0.5)
    client = openai.OpenAI(base_url=f"{served.base_url}/v1", api_key="any", max_retries=0)
    answer = client.completions.create(model="mine", prompt="Hello", max_tokens=4, timeout=300)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert live() == 1
    ledger.close()
