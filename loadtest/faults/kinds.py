"""Kinds of faults: what each does to a deployment, and how it is undone."""

import asyncio
import json
import random
import signal
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import NamedTuple

import psutil
import redis.asyncio

from loadtest.fuzzing.exchange import exchange
from loadtest.fuzzing.sending import Sending
from loadtest.servers.family import family
from router.stores import full_url

_CLIENTS = 12


class Scene(NamedTuple):
    """The deployment, and the choice among equal processes."""

    url: str
    store_port: int
    model: str
    rng: random.Random

    def one(self, role: str) -> psutil.Process:
        """Return a process of a role.

        Raises:
            LookupError: there is none.
        """
        found = [process for its, process in family() if its == role]
        if not found:
            raise LookupError(f"no process is there as {role}")
        return self.rng.choice(sorted(found, key=lambda process: process.pid))


class Kind(NamedTuple):
    """A kind of fault.

    strike: does it, and returns once it is undone, where it is.
    replaces: the role of the processes of which one has to be started again, if any.
    loses: whether requests may fail by it: those that the lost process worked on.
    within_s: how long the recovery may take.
    """

    strike: Callable[[Scene], Awaitable[None]]
    replaces: str | None = None
    loses: bool = False
    within_s: float = 2.0


def _kill(role: str) -> Callable[[Scene], Awaitable[None]]:
    async def strike(scene: Scene) -> None:
        scene.one(role).kill()

    return strike


def _stop(role: str, seconds: float) -> Callable[[Scene], Awaitable[None]]:
    """Stop a process for a while; one that is replaced meanwhile is not there to go on."""

    async def strike(scene: Scene) -> None:
        process = scene.one(role)
        process.send_signal(signal.SIGSTOP)
        try:
            # Ends early where another process takes its place.
            for _ in range(round(seconds * 10)):
                if not process.is_running():
                    return
                await asyncio.sleep(0.1)
        finally:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)

    return strike


async def _flush(scene: Scene) -> None:
    # With the password that the store's actor has kept for this user.
    async with redis.asyncio.from_url(full_url(f"redis://127.0.0.1:{scene.store_port}")) as store:
        await store.flushall()


def _request(scene: Scene) -> bytes:
    body = {"model": scene.model, "prompt": "Once", "max_tokens": 400, "ignore_eos": True,
            "stream": scene.rng.random() < 0.5}  # fmt: skip
    data = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(data) + data


async def _leave(scene: Scene) -> None:
    """Ask for long answers and leave at different moments."""
    sendings = [
        Sending((_request(scene),), (), leaves_after_s=scene.rng.uniform(0, 3))
        for _ in range(_CLIENTS)
    ]
    await asyncio.gather(*(asyncio.to_thread(exchange, scene.url, one, 10) for one in sendings))


async def _stall(scene: Scene) -> None:
    """Send a part of a request and nothing more for some seconds."""
    data = _request(scene)
    sendings = [
        Sending((data[: scene.rng.randrange(1, len(data))],), (), leaves_after_s=8.0)
        for _ in range(_CLIENTS)
    ]
    await asyncio.gather(*(asyncio.to_thread(exchange, scene.url, one, 20) for one in sendings))


KINDS: dict[str, Kind] = {
    "kill engine": Kind(_kill("engine"), "engine", loses=True, within_s=15),
    "pause engine": Kind(_stop("engine", 4)),
    "hang engine": Kind(_stop("engine", 90), "engine", loses=True, within_s=60),
    "kill replica": Kind(_kill("replica"), "replica", loses=True, within_s=15),
    "kill ingress": Kind(_kill("ingress"), "ingress", loses=True, within_s=15),
    "kill HAProxy": Kind(_kill("haproxy"), "haproxy", loses=True),
    "kill controller": Kind(_kill("controller"), "controller"),
    "pause controller": Kind(_stop("controller", 8)),
    "kill Valkey": Kind(_kill("valkey"), "valkey"),
    "flush Valkey": Kind(_flush),
    "pause Valkey": Kind(_stop("valkey", 5)),
    "clients leave": Kind(_leave),
    "clients stall": Kind(_stall),
}


def plan(seed: int, names: list[str], count: int) -> list[str]:
    """Return so many faults: all of them in a random order, then all of them in another."""
    rng = random.Random(seed)
    planned: list[str] = []
    while len(planned) < count:
        planned += rng.sample(names, len(names))
    return planned[:count]
