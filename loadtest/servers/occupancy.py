"""The live occupancy during a measurement, through `python -m router.inspect`."""

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple

# One report of a replica, as `router.inspect --json` prints it.
ReplicaLoad = dict[str, Any]


class Look(NamedTuple):
    """The reports of all replicas, and the store's keys, `at_s` seconds after the watch began."""

    at_s: float
    loads: list[ReplicaLoad]
    store_keys: int = 0


class OccupancyWatch:
    """The looks so far, and the reports of the latest one."""

    def __init__(self) -> None:
        self.looks: list[Look] = []

    @property
    def latest(self) -> list[ReplicaLoad]:
        return self.looks[-1].loads if self.looks else []


@asynccontextmanager
async def occupancy_watch(
    store_url: str, application: str, interval_s: float
) -> AsyncIterator[OccupancyWatch]:
    """Watch a store for the duration of the block."""
    watch = OccupancyWatch()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "adakv_serve.router.inspect",
        "--url", store_url, "--app", application, "--json",
        "--watch", "--interval", str(interval_s),
        stdout=asyncio.subprocess.PIPE, limit=1 << 24,
    )  # fmt: skip
    assert process.stdout is not None
    lines, began = process.stdout, time.monotonic()

    async def follow() -> None:
        async for line in lines:
            at_s = round(time.monotonic() - began, 2)
            seen = json.loads(line)
            watch.looks.append(Look(at_s, seen["replicas"], seen["store_keys"]))

    follower = asyncio.create_task(follow())
    try:
        yield watch
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        await follower
