"""`python -m loadtest.autoscaling`: a real fleet under a load that comes and goes.

Many clients for a while, then a single one until the fleet is small again. Prints a line for each
change, with replicas and occupancy, and every request that failed.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from adakv_serve.loadtest.client.sse_client import timed_completion
from adakv_serve.loadtest.servers.occupancy import OccupancyWatch, ReplicaLoad, occupancy_watch
from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.processes import serve_run
from adakv_serve.loadtest.traffic.corpus import SENTENCE

_SAMPLE_S = 0.5


class Phases(NamedTuple):
    """clients: all together for `high_s` seconds, then one. limit_s: the end in any case."""

    clients: int
    high_s: float
    limit_s: float

    def is_high(self, elapsed_s: float) -> bool:
        """Return whether all clients ask."""
        return elapsed_s <= self.high_s

    def is_over(self, elapsed_s: float, replicas: int | None) -> bool:
        """Return whether the last client stops: the fleet is small again, or time is up."""
        if elapsed_s > self.limit_s:
            return True
        return not self.is_high(elapsed_s) and replicas == 1


class Sample(NamedTuple):
    """The fleet at one moment."""

    at_s: float
    replicas: int
    occupancy: float
    running: int
    waiting: int

    @classmethod
    def of(cls, loads: list[ReplicaLoad], at_s: float) -> "Sample":
        """Add up the replicas; reserved growth counts as held."""
        total = sum(load["blocks_total"] for load in loads)
        held = sum(
            load["blocks_total"] - load["blocks_free"] + load["blocks_reserved_growth"]
            for load in loads
        )
        return cls(
            round(at_s, 1),
            len(loads),
            round(held / max(total, 1), 3),
            sum(load["running"] for load in loads),
            sum(load["waiting"] for load in loads),
        )

    def differs_from(self, before: "Sample | None") -> bool:
        """Return whether a line is due: other replicas or other running requests."""
        if before is None:
            return True
        return (self.replicas, self.running) != (before.replicas, before.running)

    def line(self) -> str:
        return (
            f"{self.at_s:6.1f} s  {self.replicas} replicas  occupancy {self.occupancy:4.0%}  "
            f"running {self.running}  waiting {self.waiting}"
        )


class Clients:
    """Clients that ask again and again. failed: why requests did not end well."""

    def __init__(self, client: httpx.AsyncClient, model: str, retry_after_s: float = 1) -> None:
        self._client, self._model = client, model
        self._retry_after_s = retry_after_s
        self.done = 0
        self.failed: list[str] = []

    async def ask_until(self, over: Callable[[], bool], name: str) -> None:
        """Ask one question after the other until `over` returns true."""
        number = 0
        while not over():
            number += 1
            prompt = f"{name}, page {number}. " + SENTENCE * 80
            try:
                await timed_completion(self._client, self._model, prompt, 200)
                self.done += 1
            except (httpx.HTTPError, RuntimeError) as error:
                self.failed.append(repr(error))
                await asyncio.sleep(self._retry_after_s)


async def drive(
    client: httpx.AsyncClient, watch: OccupancyWatch, phases: Phases, sample_s: float = _SAMPLE_S
) -> dict[str, Any]:
    """Run both phases; return counts and the timeline."""
    started = time.monotonic()
    samples: list[Sample] = []

    def elapsed_s() -> float:
        return time.monotonic() - started

    def is_low() -> bool:
        return not phases.is_high(elapsed_s())

    def is_over() -> bool:
        return phases.is_over(elapsed_s(), samples[-1].replicas if samples else None)

    (card,) = (await client.get("/v1/models")).json()["data"]
    load = Clients(client, card["id"])
    tasks = [
        asyncio.create_task(load.ask_until(is_low, f"Volume {number}"))
        for number in range(phases.clients - 1)
    ]
    tasks.append(asyncio.create_task(load.ask_until(is_over, "The last volume")))
    while not all(task.done() for task in tasks):
        await asyncio.sleep(sample_s)
        now = Sample.of(watch.latest, elapsed_s())
        if now.differs_from(samples[-1] if samples else None):
            print(now.line(), flush=True)
        samples.append(now)
    await asyncio.gather(*tasks)
    return {
        "requests": load.done,
        "failed": load.failed,
        "most_replicas": max(each.replicas for each in samples),
        "last_replicas": samples[-1].replicas,
        "timeline": [each._asdict() for each in samples],
    }


async def _drive_at(
    base_url: str, store_url: str, application: str, phases: Phases
) -> dict[str, Any]:
    async with (
        httpx.AsyncClient(base_url=base_url, timeout=600) as client,
        occupancy_watch(store_url, application, _SAMPLE_S) as watch,
    ):
        return await drive(client, watch, phases)


def run(config: dict[str, Any], phases: Phases) -> dict[str, Any]:
    """Start the deployment and drive it."""
    (application,) = config["applications"]
    port = free_port()
    log_path = Path(tempfile.mkdtemp(prefix="adakv-autoscaling-")) / "log"
    print(f"starting one replica, log in {log_path}", flush=True)
    with serve_run(config, log_path, port) as base_url:
        store_url = f"redis://127.0.0.1:{port}"
        return asyncio.run(_drive_at(base_url, store_url, application["name"], phases))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.autoscaling", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/autoscale.yaml"))
    parser.add_argument("--json", type=Path, help="write the timeline here")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--high-s", type=float, default=120, help="seconds with all clients")
    parser.add_argument("--limit-s", type=float, default=480, help="seconds altogether")
    args = parser.parse_args(argv)
    phases = Phases(args.clients, args.high_s, args.limit_s)
    result = run(yaml.safe_load(args.config.read_text()), phases)
    print(
        f"{result['requests']} requests, {len(result['failed'])} failed; "
        f"{result['most_replicas']} replicas at most, {result['last_replicas']} at the end"
    )
    for failure in result["failed"]:
        print(f"  {failure}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if not result["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
