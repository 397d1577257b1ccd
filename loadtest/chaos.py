"""`python -m loadtest.chaos --minutes M --seed S`: faults of all kinds under load.

Users ask two replicas with spill and sessions greedy questions, whose answers were learnt before,
alone. Meanwhile a seeded plan kills, stops and hangs processes, takes store and memory away, and
clients leave, stall and read slowly. Each fault is done once the deployment is whole again after
the one before. It fails where an answer is wrong or never comes, where a request fails by a fault
that loses no process of its own, where requests fail or are slow for too long afterwards, and where
processes or memory are left over in the end.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from adakv_serve.loadtest.faults.asking import ANSWERED, Questions, Users
from adakv_serve.loadtest.faults.kinds import KINDS, Scene, kinds_for, plan
from adakv_serve.loadtest.faults.recovery import Before, Recovery
from adakv_serve.loadtest.faults.windows import Struck, Window, summary, sums, table, windows
from adakv_serve.loadtest.servers.fleet import changed, wait_until_idle
from adakv_serve.loadtest.servers.occupancy import occupancy_watch
from adakv_serve.loadtest.servers.orphans import adopt_orphans
from adakv_serve.loadtest.servers.ports import free_port
from adakv_serve.loadtest.servers.processes import serve_run
from adakv_serve.loadtest.servers.store import ProxiedStore, proxied_store
from adakv_serve.loadtest.servers.twins import on_the_head, twins_config
from adakv_serve.loadtest.servers.two_nodes import two_nodes

_LOOK_EVERY_S, _IDLE_S, _WHOLE_S = 0.5, 60.0, 400.0
# Time in which the users show how long answers take, before the first fault.
_WARM_UP_S = 20.0
# A request is delayed that takes so many times as long as the slowest one then, and so long.
_SLOW, _LEAST_SLOW_S = 4, 5.0
# Between a recovery and the next fault: what is under way then has begun after the recovery.
_QUIET_S = 5.0
# Roles whose loss ends an engine. All other faults leave the engines alive.
_OF_ENGINES = ("engine", "replica")
# The deployment's own `/dev/shm`.
_SHARED_MEMORY_BYTES = 1 << 30


class Disturbed(NamedTuple):
    """What a run found. wrong_after: what was amiss at its end."""

    windows: list[Window]
    began_s: float
    wrong_after: list[str]
    slow_s: float = 0.0

    @property
    def problems(self) -> list[str]:
        found = [
            f"{window.struck.name}: {problem}"
            for window in self.windows
            for problem in window.problems(KINDS[window.struck.name])
        ]
        return found + self.wrong_after

    def as_json(self) -> dict[str, Any]:
        return {
            "kinds": [row._asdict() for row in sums(self.windows)],
            "faults": [window.as_json(self.began_s) for window in self.windows],
            "delay_is_above_s": round(self.slow_s, 2),
            "problems": self.problems,
        }

    def lines(self) -> Iterator[str]:
        """Yield the report: each fault, the reasons, each kind, and what was amiss."""
        yield from table(self.windows, self.began_s)
        for window in self.windows:
            for reason, count in window.reasons.most_common():
                yield f"{window.struck.name}: {count} x {reason}"
        yield ""
        yield from summary(sums(self.windows))
        yield f"A request is delayed that takes more than {self.slow_s:.1f} s."
        yield from (f"PROBLEM: {problem}" for problem in self.problems)


class Target(NamedTuple):
    """A deployment that this process has started.

    store_port: of the store's server. store: None if the deployment has started its own.
    """

    url: str
    application: str
    store_port: int
    store: ProxiedStore | None = None


async def disturb(target: Target, names: Sequence[str], args: argparse.Namespace) -> Disturbed:
    """Disturb a deployment while users ask it."""
    limits = httpx.Limits(max_keepalive_connections=0)
    store_url = f"redis://127.0.0.1:{target.store_port}"
    async with (
        httpx.AsyncClient(base_url=target.url, timeout=args.hang_s, limits=limits) as client,
        occupancy_watch(store_url, target.application, _LOOK_EVERY_S) as watch,
    ):
        (card,) = (await client.get("/v1/models")).raise_for_status().json()["data"]
        while len(watch.latest) < 2:
            await asyncio.sleep(0.1)
        questions = await Questions.learn(client, card["id"], args.questions, args.output_tokens)
        users = Users(client, questions, args.hang_s)
        asking = asyncio.create_task(users.run(args.users, args.seed))
        slow_s = await _slow_s(users)
        recovery = Recovery(client, watch, users, slow_s)
        rng = random.Random(args.seed)
        scene = Scene(target.url, target.store_port, card["id"], rng, args.hang_s, target.store)
        began_s, struck, wrong = time.monotonic(), [], []
        await asyncio.sleep(_QUIET_S)
        for name in names:
            if time.monotonic() > began_s + args.minutes * 60:
                break
            await recovery.all_report()
            before, first_look = recovery.before(), len(watch.looks)
            struck.append(await _strike(name, scene, recovery, before))
            print(f"{name}: {_recovered(struck[-1])}", flush=True)
            await asyncio.sleep(_QUIET_S)
            if KINDS[name].replaces not in _OF_ENGINES:
                await recovery.all_report()
                wrong.append(_named(name, changed(set(before.engines), watch.looks[first_look:])))
        users.stop()
        await asking
        wrong += [await wait_until_idle(watch, 2, _IDLE_S), recovery.left_over()]
    return Disturbed(
        windows(struck, users.asked, slow_s),
        began_s,
        [text for text in wrong if text is not None],
        slow_s,
    )


def _named(name: str, problem: str | None) -> str | None:
    return None if problem is None else f"{name}: {problem}"


async def _slow_s(users: Users) -> float:
    """Return the time above which an answer is delayed, from undisturbed ones under load."""
    await asyncio.sleep(_WARM_UP_S)
    while not users.asked:
        await asyncio.sleep(1.0)
    if bad := [one for one in users.asked if one.outcome not in ANSWERED]:
        raise RuntimeError(f"requests fail before the first fault: {bad[:3]}")
    return max(_LEAST_SLOW_S, _SLOW * max(one.ended_s - one.began_s for one in users.asked))


async def _strike(name: str, scene: Scene, recovery: Recovery, before: Before) -> Struck:
    kind, struck_s = KINDS[name], time.monotonic()
    seen = await kind.strike(scene)
    # One that is undone has ended only now.
    ended_s = struck_s if kind.replaces is not None else time.monotonic()
    whole_s = await recovery.wait(ended_s, kind.replaces, before, _WHOLE_S)
    return Struck(name, struck_s, ended_s, whole_s, seen)


def _recovered(struck: Struck) -> str:
    if struck.whole_s is None:
        return "never whole again"
    return f"whole again after {struck.whole_s:.1f} s"


@contextmanager
def deployed(args: argparse.Namespace, folder: Path) -> Iterator[Target]:
    """Run the deployment of a chaos run for the duration of the block."""
    config = yaml.safe_load(args.config.read_text()) if args.config else twins_config()
    with ExitStack() as stack:
        store = None if args.embedded_store else stack.enter_context(proxied_store())
        address, (application,) = None, config["applications"]
        if args.nodes > 1:
            config = on_the_head(config, "Ingress")
            log = folder / "nodes.log"
            address = stack.enter_context(two_nodes(log, _SHARED_MEMORY_BYTES)).address
        port = free_port() if store is None else store.server_port
        url = stack.enter_context(
            serve_run(
                config,
                args.log or folder / "server.log",
                port,
                address,
                store_url=None if store is None else f"redis://127.0.0.1:{store.port}",
                shm_bytes=None if args.nodes > 1 else _SHARED_MEMORY_BYTES,
            )
        )
        yield Target(url, application["name"], port, store)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.chaos",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, nargs="?", help="of `serve run`, with two replicas")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--faults",
        nargs="+",
        choices=KINDS,
        metavar="NAME",
        help="instead of all possible",
    )
    parser.add_argument("--nodes", type=int, choices=(1, 2), default=1, help="of the Ray cluster")
    parser.add_argument(
        "--embedded-store", action="store_true", help="instead of a store with a network of its own"
    )
    parser.add_argument("--users", type=int, default=4)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--output-tokens", type=int, default=48)
    parser.add_argument("--hang-s", type=float, default=180.0, help="a longer wait is a hang")
    parser.add_argument("--log", type=Path, help="write the deployment's log here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args(argv)
    possible = kinds_for(args.nodes, parts=not args.embedded_store)
    chosen = args.faults or possible
    if impossible := sorted(set(chosen) - set(possible)):
        parser.error(f"these need --nodes 2, or no --embedded-store: {', '.join(impossible)}")
    # More than fit into the time; it ends the plan.
    names = plan(args.seed, chosen, max(len(chosen), round(args.minutes * 12)))
    adopt_orphans()
    with (
        tempfile.TemporaryDirectory(prefix="adakv-chaos-") as folder,
        deployed(args, Path(folder)) as target,
    ):
        found = asyncio.run(disturb(target, names, args))
    print("\n".join(found.lines()))
    if args.json:
        args.json.write_text(json.dumps(found.as_json(), indent=2) + "\n")
    return 1 if found.problems else 0


if __name__ == "__main__":
    sys.exit(main())
