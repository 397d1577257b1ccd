"""`python -m loadtest.fuzz --requests N --seed S`: odd requests that must not break a deployment.

Requests of all open endpoints are mutated: values, fields, JSON, encodings, headers, lengths,
methods, and how a client sends and leaves. It starts `configs/cluster.yaml`, or uses `--url`.
`--only K` sends request K of the seed again. A key comes from $OPENAI_API_KEY.

It fails where a request gets a 5xx (other than a 503 with Retry-After), no answer, half an answer
or an error in another form than OpenAI's; where an engine has died; where blocks, running or
waiting requests stay afterwards; where a plain greedy request is then answered differently.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from adakv.progress import waiting
from adakv_serve.loadtest.fuzzing.attempts import Target
from adakv_serve.loadtest.fuzzing.campaign import Campaign, Judged, table
from adakv_serve.loadtest.servers.fleet import changed, lives, wait_until_idle
from adakv_serve.loadtest.servers.occupancy import OccupancyWatch, occupancy_watch
from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.processes import serve_run

_CONFIG = Path(__file__).parents[1] / "serving" / "configs" / "cluster.yaml"
# Shorter than a block: no cached prefix changes how it is computed.
_PLAIN = {"prompt": "The ship left the harbour at", "max_tokens": 16, "temperature": 0}
_LOOK_EVERY_S = 0.5
_FIRST_REPORTS_S, _IDLE_S = 180.0, 60.0


class Deployed(NamedTuple):
    """A running deployment of so many replicas. store_url: None where its ledger is not read."""

    url: str
    store_url: str | None
    replicas: int
    application: str = "llm"
    key: str | None = None


class Figures(NamedTuple):
    """What a run found. wrong_after: what was amiss at its end."""

    campaign: Campaign
    wrong_after: list[str]
    elapsed_s: float

    @property
    def is_good(self) -> bool:
        return not self.campaign.faults and not self.wrong_after

    def as_json(self) -> dict[str, Any]:
        return {
            "by_kind": self.campaign.by_kind, "by_path": self.campaign.by_path,
            "faults": self.campaign.fault_count,
            "first_faults": [fault.as_json() for fault in self.campaign.faults],
            "wrong_after": self.wrong_after, "elapsed_s": round(self.elapsed_s, 1),
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """Yield the report: outcomes by kind and path, and what was amiss."""
        yield from table(self.campaign.by_kind)
        yield ""
        yield from table(self.campaign.by_path)
        yield ""
        sent = sum(sum(counter.values()) for counter in self.campaign.by_kind.values())
        yield f"{sent} requests in {self.elapsed_s:.0f} s, {self.campaign.fault_count} faults"
        yield from self.wrong_after


def fuzz(
    deployed: Deployed,
    seed: int,
    numbers: Iterable[int],
    concurrency: int = 8,
    limit_s: float = 120.0,
    on_done: Callable[[Judged], None] = lambda judged: None,
) -> Figures:
    """Send these requests of a seed, and check the deployment before and after.

    Args:
        concurrency: how many are sent at once.
        limit_s: an answer that takes longer counts as a hang.
        on_done: called with each request and its answer, as they come.

    Raises:
        httpx.HTTPError: the deployment does not answer a plain request before.
        TimeoutError: not all replicas report.
    """
    campaign = Campaign(deployed.url, limit_s)
    return asyncio.run(_fuzz(deployed, campaign, seed, numbers, concurrency, on_done))


async def _fuzz(
    deployed: Deployed,
    campaign: Campaign,
    seed: int,
    numbers: Iterable[int],
    concurrency: int,
    on_done: Callable[[Judged], None],
) -> Figures:
    headers = {} if deployed.key is None else {"authorization": f"Bearer {deployed.key}"}
    async with contextlib.AsyncExitStack() as stack:
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=deployed.url, headers=headers, timeout=120)
        )
        watch = None
        if deployed.store_url is not None:
            watch = await stack.enter_async_context(
                occupancy_watch(deployed.store_url, deployed.application, _LOOK_EVERY_S)
            )
            await _first_reports(watch, deployed.replicas)
        (card,) = (await client.get("/v1/models")).raise_for_status().json()["data"]
        model = card["id"]
        before = await _plain_answer(client, model)
        engines = lives(watch.latest) if watch is not None else set()
        began, first_look = time.monotonic(), len(watch.looks) if watch is not None else 0
        target = Target(model, deployed.key)
        await campaign.send(target, seed, numbers, concurrency, on_done)
        elapsed_s = time.monotonic() - began
        wrong = [campaign.stopped]
        if watch is not None:
            wrong += [await wait_until_idle(watch, len(engines), _IDLE_S)]
            wrong += [changed(engines, watch.looks[first_look:])]
        wrong += [await _differs(client, model, before)]
    return Figures(campaign, [text for text in wrong if text is not None], elapsed_s)


async def _first_reports(watch: OccupancyWatch, replicas: int) -> None:
    async with asyncio.timeout(_FIRST_REPORTS_S):
        while len(watch.latest) < replicas:
            await asyncio.sleep(0.1)


async def _plain_answer(client: httpx.AsyncClient, model: str) -> str:
    response = await client.post("/v1/completions", json={"model": model, **_PLAIN})
    text: str = response.raise_for_status().json()["choices"][0]["text"]
    return text


async def _differs(client: httpx.AsyncClient, model: str, before: str) -> str | None:
    try:
        after = await _plain_answer(client, model)
    except httpx.HTTPError as error:
        return f"a plain request fails: {error!r}"
    return None if after == before else f"a plain request gets {after!r}, and before {before!r}"


def _for_minutes(numbers: Iterable[int], minutes: float) -> Iterator[int]:
    """Yield numbers for so many minutes."""
    until_s: float | None = None
    for number in numbers:
        until_s = until_s or time.monotonic() + 60 * minutes
        if time.monotonic() > until_s:
            return
        yield number


def _print(judged: Judged) -> None:
    print(judged, flush=True)


def _print_fault(judged: Judged) -> None:
    if judged.problem is not None:
        _print(judged)


@contextlib.contextmanager
def _deployed(args: argparse.Namespace) -> Iterator[Deployed]:
    key = os.environ.get("OPENAI_API_KEY")
    if args.url is not None:
        yield Deployed(args.url.rstrip("/"), args.store_url, args.replicas, args.app, key)
        return
    config, store_port = yaml.safe_load(_CONFIG.read_text()), free_port()
    (application,) = config["applications"]
    with tempfile.TemporaryDirectory(prefix="adakv-fuzz-") as folder:
        log = args.log or Path(folder) / "server.log"
        with serve_run(config, log, store_port) as url:
            replicas = application["args"]["replica"]["count"]
            store_url = f"redis://127.0.0.1:{store_port}"
            yield Deployed(url, store_url, replicas, application["name"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.fuzz",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--minutes", type=float, help="send no more after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, metavar="K", help="send request K alone")
    parser.add_argument("--first", type=int, default=0, help="number of the first request")
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--limit-s", type=float, default=300.0, help="a longer wait is a hang")
    parser.add_argument("--url", help="of a running deployment; without it one is started")
    parser.add_argument("--store-url", help="its store; without it blocks and engines are not seen")
    parser.add_argument("--replicas", type=int, default=1, help="of the deployment at --url")
    parser.add_argument("--app", default="llm", help="Serve application name")
    parser.add_argument("--log", type=Path, help="write the started deployment's log here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    numbers: Iterable[int] = range(args.first, args.first + args.requests)
    on_done = _print_fault
    if args.only is not None:
        numbers, on_done = range(args.only, args.only + 1), _print
    if args.minutes is not None:
        numbers = _for_minutes(numbers, args.minutes)
    with _deployed(args) as deployed, waiting("odd requests", args.requests) as tell:
        done = itertools.count(1)

        def count(judged: Judged) -> None:
            tell(next(done), "")
            on_done(judged)

        found = fuzz(deployed, args.seed, numbers, args.concurrency, args.limit_s, count)
    print("\n".join(found.lines()))
    if args.json:
        args.json.write_text(json.dumps(found.as_json(), indent=2) + "\n")
    return 0 if found.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
