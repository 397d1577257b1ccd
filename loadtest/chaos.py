"""`python -m loadtest.chaos --minutes M --seed S`: faults of all kinds under load.

Users ask two replicas with spill and sessions greedy questions, whose answers were learnt before,
alone. Meanwhile a seeded plan kills, stops and hangs processes, and clients leave and stall. Each
fault is done once the deployment has recovered from the one before. It fails where an answer is
wrong or never comes, where a request fails by a fault that loses no process of its own, where a
recovery takes too long, and where processes or memory are left over in the end.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from loadtest.faults.asking import Questions, Users
from loadtest.faults.kinds import KINDS, Scene, plan
from loadtest.faults.recovery import Recovery
from loadtest.faults.windows import Struck, Window, table, windows
from loadtest.servers.fleet import wait_until_idle
from loadtest.servers.occupancy import occupancy_watch
from loadtest.servers.ports import free_port
from loadtest.servers.processes import serve_run
from loadtest.servers.twins import twins_config

_LOOK_EVERY_S, _IDLE_S, _RECOVERY_S = 0.5, 60.0, 240.0
# Between a recovery and the next fault: what is under way then has begun after the recovery.
_QUIET_S = 5.0


class Disturbed(NamedTuple):
    """What a run found. wrong_after: what was amiss at its end."""

    windows: list[Window]
    began_s: float
    wrong_after: list[str]

    @property
    def problems(self) -> list[str]:
        found = [
            f"{window.struck.name}: {problem}"
            for window in self.windows
            for problem in window.problems(KINDS[window.struck.name])
        ]
        return found + self.wrong_after

    def as_json(self) -> dict[str, Any]:
        rows = [
            {
                "fault": window.struck.name, "recovered_s": window.struck.recovered_s,
                "at_s": round(window.struck.struck_s - self.began_s, 2),
                "under_way": window.under_way, "outcomes": window.outcomes,
                "reasons": window.reasons,
            }
            for window in self.windows
        ]  # fmt: skip
        return {"faults": rows, "problems": self.problems}

    def lines(self) -> Iterator[str]:
        """Yield the report: a line for each fault, the reasons, and what was amiss."""
        yield from table(self.windows, self.began_s)
        for window in self.windows:
            for reason, count in window.reasons.most_common():
                yield f"{window.struck.name}: {count} x {reason}"
        yield from (f"PROBLEM: {problem}" for problem in self.problems)


async def disturb(
    url: str, store_port: int, application: str, names: Sequence[str], args: argparse.Namespace
) -> Disturbed:
    """Disturb a deployment that this process has started, while users ask it."""
    limits = httpx.Limits(max_keepalive_connections=0)
    async with (
        httpx.AsyncClient(base_url=url, timeout=args.hang_s, limits=limits) as client,
        occupancy_watch(f"redis://127.0.0.1:{store_port}", application, _LOOK_EVERY_S) as watch,
    ):
        (card,) = (await client.get("/v1/models")).raise_for_status().json()["data"]
        while len(watch.latest) < 2:
            await asyncio.sleep(0.1)
        questions = await Questions.learn(client, card["id"], args.questions, args.output_tokens)
        users = Users(client, questions, args.hang_s)
        recovery = Recovery(client, watch, users)
        scene = Scene(url, store_port, card["id"], random.Random(args.seed))
        asking = asyncio.create_task(users.run(args.users, args.seed))
        began_s, struck = time.monotonic(), []
        for name in names:
            await asyncio.sleep(_QUIET_S)
            if time.monotonic() > began_s + args.minutes * 60:
                break
            struck.append(await _strike(name, scene, recovery))
            print(f"{name}: {_recovered(struck[-1])}", flush=True)
        users.stop()
        await asking
        wrong = [await wait_until_idle(watch, 2, _IDLE_S), recovery.left_over()]
    return Disturbed(
        windows(struck, users.asked), began_s, [text for text in wrong if text is not None]
    )


async def _strike(name: str, scene: Scene, recovery: Recovery) -> Struck:
    kind, struck_s = KINDS[name], time.monotonic()
    await kind.strike(scene)
    # One that is undone has ended only now.
    since_s = struck_s if kind.replaces is not None else time.monotonic()
    return Struck(name, struck_s, await recovery.wait(since_s, kind.replaces, _RECOVERY_S))


def _recovered(struck: Struck) -> str:
    if struck.recovered_s is None:
        return "no recovery"
    return f"recovered after {struck.recovered_s:.1f} s"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, nargs="?", help="of `serve run`, with two replicas")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="+", choices=KINDS, default=list(KINDS), metavar="NAME")
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--hang-s", type=float, default=180.0, help="a longer wait is a hang")
    parser.add_argument("--log", type=Path, help="write the deployment's log here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    config = yaml.safe_load(args.config.read_text()) if args.config else twins_config()
    (application,), port = config["applications"], free_port()
    # More than fit into the time; it ends the plan.
    names = plan(args.seed, args.faults, max(len(args.faults), round(args.minutes * 12)))
    with tempfile.TemporaryDirectory(prefix="adakv-chaos-") as folder:
        log = args.log or Path(folder) / "server.log"
        with serve_run(config, log, port) as url:
            found = asyncio.run(disturb(url, port, application["name"], names, args))
    print("\n".join(found.lines()))
    if args.json:
        args.json.write_text(json.dumps(found.as_json(), indent=2) + "\n")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
