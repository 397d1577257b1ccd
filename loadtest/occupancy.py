"""The live occupancy during a measurement, through `python -m router.inspect`."""

import asyncio
import contextlib
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

# One report of a replica, as `router.inspect --json` prints it.
Load = dict[str, Any]


class OccupancyWatch:
    """The reports of all replicas, look after look. `latest` is the last one."""

    def __init__(self) -> None:
        self.looks: list[list[Load]] = []

    @property
    def latest(self) -> list[Load]:
        return self.looks[-1] if self.looks else []


@asynccontextmanager
async def occupancy_watch(
    store_url: str, application: str, interval_s: float
) -> AsyncIterator[OccupancyWatch]:
    """Watches a store for the duration of the block."""
    watch = OccupancyWatch()
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "router.inspect", "--url", store_url, "--app", application,
        "--json", "--watch", "--interval", str(interval_s),
        stdout=asyncio.subprocess.PIPE, limit=1 << 24,
    )  # fmt: skip
    assert process.stdout is not None
    lines = process.stdout

    async def follow() -> None:
        async for line in lines:
            watch.looks.append(json.loads(line)["replicas"])

    follower = asyncio.create_task(follow())
    try:
        yield watch
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        await follower
