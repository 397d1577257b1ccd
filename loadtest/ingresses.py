"""`python -m loadtest.ingresses`: what several front doors cost, and whether they know each other.

For each number of ingresses one cluster of two replicas is started. Each request has a connection
of its own, so that HAProxy spreads them over the ingresses. `returned` is the share of repeated
prompts that came back to the replica of the first one; `fullest` the share of simultaneous requests
at the replica that got most of them. The processor time is that of the ingress processes.
"""

import argparse
import asyncio
import json
import ssl
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psutil
import yaml

from adakv_serve.loadtest.client.records import percentile
from adakv_serve.loadtest.servers.processes import serve_run, with_args
from adakv_serve.loadtest.traffic.corpus import SENTENCE

_PROCESS = "ray::ServeReplica:"
_DEPLOYMENT = ":Ingress"
_REPLICA_HEADER = "x-replica-id"
# Otherwise each client would read the system's certificates.
_NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


class Load(NamedTuple):
    """What is sent: cheap requests, prompts that are repeated, and prompts at the same time."""

    requests: int = 600
    at_once: int = 32
    prompts: int = 12
    repeats: int = 4
    simultaneous: int = 24


class Figures(NamedTuple):
    """Figures of one cluster. cpu_ms: processor time of all ingresses for one cheap request."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    returned: float
    fullest: float


async def measured(url: str, load: Load) -> Figures:
    """Put the load on a running cluster."""
    model = (await _send(url, "GET", "/v1/models")).json()["data"][0]["id"]
    await _many(url, load.at_once, load.at_once)
    before_s, began = _ingress_cpu_s(), time.perf_counter()
    times = await _many(url, load.requests, load.at_once)
    elapsed_s, cpu_s = time.perf_counter() - began, _ingress_cpu_s() - before_s
    returned = await _returned(url, model, load)
    fullest = await _fullest(url, model, load.simultaneous)
    return Figures(
        load.requests / elapsed_s, 1000 * (percentile(times, 0.5) or 0),
        1000 * (percentile(times, 0.99) or 0), 1000 * cpu_s / load.requests, returned, fullest,
    )  # fmt: skip


async def _many(url: str, count: int, at_once: int) -> list[float]:
    """Send cheap requests and return their times."""
    numbers, times = iter(range(count)), []

    async def worker() -> None:
        for _ in numbers:
            began = time.perf_counter()
            await _send(url, "GET", "/v1/models")
            times.append(time.perf_counter() - began)

    await asyncio.gather(*(worker() for _ in range(at_once)))
    return times


async def _returned(url: str, model: str, load: Load) -> float:
    """Return the share of repeated prompts that came back to their replica."""
    back = 0
    for number in range(load.prompts):
        prompt = f"{number}: " + SENTENCE * 12
        first = await _complete(url, model, prompt)
        back += sum([await _complete(url, model, prompt) == first for _ in range(load.repeats)])
    return back / (load.prompts * load.repeats)


async def _fullest(url: str, model: str, count: int) -> float:
    """Return the share of prompts sent at the same time that the fuller replica got."""
    prompts = (f"At once {number}: " + SENTENCE * 12 for number in range(count))
    replicas = await asyncio.gather(*(_complete(url, model, prompt) for prompt in prompts))
    return Counter(replicas).most_common(1)[0][1] / count


async def _complete(url: str, model: str, prompt: str) -> str:
    """Send a prompt and return its replica."""
    body = {"model": model, "prompt": prompt, "max_tokens": 2, "temperature": 0}
    return (await _send(url, "POST", "/v1/completions", body)).headers[_REPLICA_HEADER]


async def _send(url: str, method: str, path: str, body: Any = None) -> httpx.Response:
    """Send a request over a new connection.

    Raises:
        httpx.HTTPError: the server refused or the connection failed.
    """
    async with httpx.AsyncClient(base_url=url, timeout=120, verify=_NO_TLS) as client:
        response = await client.request(method, path, json=body)
    response.raise_for_status()
    return response


def _ingress_cpu_s() -> float:
    """Return the processor time that all ingress processes of this machine have used."""
    total = 0.0
    for process in psutil.process_iter(["cmdline", "cpu_times"]):
        title = " ".join(process.info["cmdline"] or [])
        if title.startswith(_PROCESS) and _DEPLOYMENT in title:
            total += process.info["cpu_times"].user + process.info["cpu_times"].system
    return total


def run(config_path: Path, counts: list[int], load: Load) -> dict[int, Figures]:
    """Start a cluster for each number of ingresses, and measure it."""
    figures = {}
    logs = Path(tempfile.mkdtemp(prefix="adakv-ingresses-"))
    print(f"logs in {logs}", flush=True)
    for count in counts:
        config = yaml.safe_load(config_path.read_text())
        ingress = {**config["applications"][0]["args"].get("ingress", {}), "count": count}
        with serve_run(with_args(config, ingress=ingress), logs / f"{count}.log") as url:
            figures[count] = row = asyncio.run(measured(url, load))
        print(
            f"{count} ingresses: {row.requests_per_s:.0f} requests/s, p50 {row.p50_ms:.1f} ms, p99 "
            f"{row.p99_ms:.1f} ms, {row.cpu_ms:.2f} ms of a core for each; repeated prompts "
            f"{row.returned:.0%} back at their replica, at most {row.fullest:.0%} of simultaneous "
            "ones at one",
            flush=True,
        )
    return figures


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m loadtest.ingresses", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--config", type=Path, default=Path("configs/cluster.yaml"))
    parser.add_argument("--ingresses", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--requests", type=int, default=Load().requests)
    args = parser.parse_args(argv)
    figures = run(args.config, args.ingresses, Load(requests=args.requests))
    if args.json:
        rows = {str(count): row._asdict() for count, row in figures.items()}
        args.json.write_text(json.dumps(rows, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
