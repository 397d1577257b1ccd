"""`python -m loadtest.autoscaling`: a real fleet under a load that comes and goes.

Many clients for a while, then a single one until the fleet is small again: a line for each change,
replicas against occupancy, and every request that failed.
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

from loadtest.client.sse_client import timed_completion
from loadtest.servers.occupancy import ReplicaLoad, occupancy_watch
from loadtest.servers.ports import free_port
from loadtest.servers.processes import serve_run

_SAMPLE_S = 0.5
_SENTENCE = "The harbour master wrote down the weather of the hour and every ship that passed. "


class Sample(NamedTuple):
    at_s: float
    replicas: int
    occupancy: float
    running: int
    waiting: int

    def line(self) -> str:
        return (
            f"{self.at_s:6.1f} s  {self.replicas} replicas  occupancy {self.occupancy:4.0%}  "
            f"running {self.running}  waiting {self.waiting}"
        )


class Clients:
    """Clients that ask again and again; `failed` says why a request did not end well."""

    def __init__(self, client: httpx.AsyncClient, model: str) -> None:
        self._client, self._model = client, model
        self.done = 0
        self.failed: list[str] = []

    async def ask_until(self, over: Callable[[], bool], name: str) -> None:
        number = 0
        while not over():
            number += 1
            prompt = f"{name}, page {number}. " + _SENTENCE * 80
            try:
                await timed_completion(self._client, self._model, prompt, 200)
                self.done += 1
            except (httpx.HTTPError, RuntimeError) as error:
                self.failed.append(repr(error))
                await asyncio.sleep(1)


def sample(loads: list[ReplicaLoad], at_s: float) -> Sample:
    total = sum(load["blocks_total"] for load in loads)
    held = sum(
        load["blocks_total"] - load["blocks_free"] + load["blocks_reserved_growth"]
        for load in loads
    )
    return Sample(
        round(at_s, 1),
        len(loads),
        round(held / max(total, 1), 3),
        sum(load["running"] for load in loads),
        sum(load["waiting"] for load in loads),
    )


async def drive(
    base_url: str, store_url: str, application: str, args: argparse.Namespace
) -> dict[str, Any]:
    started = time.monotonic()
    samples: list[Sample] = []

    def high_load_over() -> bool:
        return time.monotonic() - started > args.high_s

    def all_over() -> bool:
        if time.monotonic() - started > args.limit_s:
            return True
        return high_load_over() and bool(samples) and samples[-1].replicas == 1

    async with (
        httpx.AsyncClient(base_url=base_url, timeout=600) as client,
        occupancy_watch(store_url, application, _SAMPLE_S) as watch,
    ):
        (card,) = (await client.get("/v1/models")).json()["data"]
        load = Clients(client, card["id"])
        clients = [
            asyncio.create_task(load.ask_until(high_load_over, f"Volume {number}"))
            for number in range(args.clients - 1)
        ]
        clients.append(asyncio.create_task(load.ask_until(all_over, "The last volume")))
        while not all(task.done() for task in clients):
            await asyncio.sleep(_SAMPLE_S)
            now = sample(watch.latest, time.monotonic() - started)
            before = samples[-1] if samples else None
            if before is None or now.replicas != before.replicas or now.running != before.running:
                print(now.line(), flush=True)
            samples.append(now)
        await asyncio.gather(*clients)
    return {
        "requests": load.done,
        "failed": load.failed,
        "most_replicas": max(each.replicas for each in samples),
        "last_replicas": samples[-1].replicas,
        "timeline": [each._asdict() for each in samples],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.autoscaling", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/autoscale.yaml"))
    parser.add_argument("--json", type=Path, help="write the timeline here")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--high-s", type=float, default=120, help="seconds with all clients")
    parser.add_argument("--limit-s", type=float, default=480, help="seconds altogether")
    args = parser.parse_args(argv)
    config = yaml.safe_load(args.config.read_text())
    (application,) = config["applications"]
    port = free_port()
    log_path = Path(tempfile.mkdtemp(prefix="adakv-autoscaling-")) / "log"
    print(f"starting one replica, log in {log_path}", flush=True)
    with serve_run(config, log_path, port) as base_url:
        store_url = f"redis://127.0.0.1:{port}"
        result = asyncio.run(drive(base_url, store_url, application["name"], args))
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
