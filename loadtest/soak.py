"""`python -m loadtest.soak --hours H`: two replicas under a mixed load, and what grows meanwhile.

Sessions of all kinds ask a deployment with sessions and spill; a tenth of the clients leave. Every
`--every-s` seconds: memory, files, threads and connections of each process, blocks, held sessions
and waiting requests of each replica, the store's keys. It fails where one of them grows faster than
its limit over the second half of the run, where a request fails, or where replicas still hold
something afterwards. The slope is that of the medians of twelve spans of that half (the median of
all pairs' slopes), and it counts if it is surely above 0 (the lower end of its 95 % interval).
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from adakv.progress import waiting
from adakv_serve.loadtest.servers.fleet import changed, lives, wait_until_idle
from adakv_serve.loadtest.servers.occupancy import OccupancyWatch, occupancy_watch
from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.processes import serve_run
from adakv_serve.loadtest.servers.twins import twins_config
from adakv_serve.loadtest.soaking.load import MixedLoad, fill_by_size, mixed_sessions
from adakv_serve.loadtest.soaking.samples import Name, Samples, table
from adakv_serve.loadtest.soaking.slopes import Trend
from adakv_serve.loadtest.traffic.workloads import Sizes

_LOOK_EVERY_S, _IDLE_S, _TIMEOUT_S = 2.0, 120.0, 600.0


class Soaked(NamedTuple):
    """What a run found. wrong_after: what was amiss at its end."""

    samples: Samples
    trends: dict[Name, Trend]
    outcomes: dict[str, int]
    failures: dict[str, int]
    wrong_after: list[str]

    @property
    def growing(self) -> list[Name]:
        return [name for name, one in self.trends.items() if one.grows]

    @property
    def is_good(self) -> bool:
        return not (self.growing or self.failures or self.wrong_after)

    def as_json(self) -> dict[str, Any]:
        return {
            "trends": [
                {"subject": name[0], "measure": name[1], **one._asdict()}
                for name, one in sorted(self.trends.items())
            ],
            "outcomes": self.outcomes, "failures": self.failures, "wrong_after": self.wrong_after,
            "samples": {" / ".join(name): series for name, series in self.samples.series.items()},
        }  # fmt: skip

    def lines(self) -> Iterator[str]:
        """Yield the report: the table of trends, the requests, and what was amiss."""
        yield from table(self.trends)
        yield f"requests: {self.outcomes}"
        for subject, measure in self.growing:
            yield f"GROWS: {measure} of {subject}"
        if self.failures:
            yield f"FAILED: {self.failures}"
        yield from self.wrong_after


async def soak(url: str, store_url: str, application: str, args: argparse.Namespace) -> Soaked:
    """Load a deployment that this process has started, and watch what its processes hold."""
    seconds, samples = args.hours * 3600, Samples()
    async with (
        httpx.AsyncClient(base_url=url, timeout=_TIMEOUT_S) as client,
        occupancy_watch(store_url, application, _LOOK_EVERY_S) as watch,
    ):
        (card,) = (await client.get("/v1/models")).raise_for_status().json()["data"]
        sizes = Sizes(args.prompt_tokens, args.output_tokens)
        tokenizer = _tokenizer()
        asked = mixed_sessions(tokenizer, card["max_model_len"], sizes, args.seed)
        load = MixedLoad(client, card["id"], asked, args.seed)
        while len(watch.latest) < 2:
            await asyncio.sleep(0.1)
        with waiting("filling what engines keep by size"):
            await fill_by_size(client, card["id"], tokenizer.vocab_size, args.seed)
        engines, first_look = lives(watch.latest), len(watch.looks)
        with waiting(f"load of {args.hours:g} hours", seconds) as tell:
            sampling = asyncio.create_task(
                _sample(samples, watch, args.every_s, lambda at_s: tell(at_s, f"{load.outcomes}"))
            )
            try:
                await load.run(args.users, seconds)
            finally:
                sampling.cancel()
        wrong = [
            await wait_until_idle(watch, len(engines), _IDLE_S),
            changed(engines, watch.looks[first_look:]),
        ]
    return Soaked(
        samples,
        samples.trends(seconds),
        dict(load.outcomes),
        load.failures,
        [text for text in wrong if text is not None],
    )


async def _sample(
    samples: Samples, watch: OccupancyWatch, every_s: float, tell: Callable[[float], None]
) -> None:
    began = time.monotonic()
    while True:
        look = watch.looks[-1] if watch.looks else None
        # Reading a hundred processes takes a while.
        await asyncio.to_thread(samples.take, time.monotonic() - began, look)
        tell(time.monotonic() - began)
        await asyncio.sleep(every_s)


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    from adakv_serve.serving.models.embedded import embedded_model_path

    return AutoTokenizer.from_pretrained(embedded_model_path())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.soak",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--hours", type=float, default=2.0)
    parser.add_argument("--every-s", type=float, default=20.0, help="between two samples")
    parser.add_argument("--users", type=int, default=6)
    parser.add_argument("--prompt-tokens", type=int, default=900)
    parser.add_argument("--output-tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="write the deployment's log here")
    parser.add_argument("--json", type=Path, help="write trends and all samples here")
    args = parser.parse_args(argv)
    config, port = twins_config(), free_port()
    (application,) = config["applications"]
    with tempfile.TemporaryDirectory(prefix="adakv-soak-") as folder:
        log = args.log or Path(folder) / "server.log"
        with serve_run(config, log, port) as url:
            found = asyncio.run(soak(url, f"redis://127.0.0.1:{port}", application["name"], args))
    print("\n".join(found.lines()))
    if args.json:
        args.json.write_text(json.dumps(found.as_json(), indent=2) + "\n")
    return 0 if found.is_good else 1


if __name__ == "__main__":
    sys.exit(main())
