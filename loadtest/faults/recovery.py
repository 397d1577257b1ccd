"""When a deployment is again what it was before a fault."""

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import NamedTuple, Protocol

import httpx

from adakv_serve.loadtest.faults.asking import ANSWERED, Asked
from adakv_serve.loadtest.servers.family import family
from adakv_serve.loadtest.servers.fleet import Life, lives
from adakv_serve.loadtest.servers.occupancy import OccupancyWatch

_PROBE_EVERY_S, _HEALTH_TIMEOUT_S = 0.25, 5.0
# A report of a dead replica counts for two seconds.
_STEADY_S = 2.5
# A store that has been flushed has the reports of all replicas again after a second.
_PATIENCE_S = 30.0
# These come and go without anybody's doing.
_PASSING = ("idle worker", "helper")
# Those whose loss is the loss of an engine.
_WITH_ENGINE = ("engine", "replica")


class Asks(Protocol):
    """Asks one known question, and judges the answer."""

    async def ask(self, number: int, *, stream: bool, timeout_s: float | None = None) -> Asked: ...


class Living(NamedTuple):
    """A process of the deployment."""

    role: str
    pid: int


class Before(NamedTuple):
    """A fleet before a fault: its processes, and the engines that report."""

    processes: frozenset[Living]
    engines: frozenset[Life]


def living() -> frozenset[Living]:
    """Return the processes that do not come and go by themselves."""
    return frozenset(
        Living(role, process.pid) for role, process in family() if role not in _PASSING
    )


def _roles(processes: Iterable[Living]) -> Counter[str]:
    return Counter(one.role for one in processes)


class Recovery:
    """Looks whether the fleet, its processes and its answers are as they were at the start."""

    def __init__(
        self,
        client: httpx.AsyncClient,
        watch: OccupancyWatch,
        users: Asks,
        slow_s: float,
        look: Callable[[], frozenset[Living]] = living,
        steady_s: float = _STEADY_S,
    ) -> None:
        """
        Args:
            slow_s: an answer that takes longer is not well.
            steady_s: for how long all must be well.
        """
        self._client = client
        self._watch = watch
        self._users = users
        self._slow_s = slow_s
        self._look = look
        self._steady_s = steady_s
        self._replicas = len(watch.latest)
        self._roles = _roles(look())

    async def all_report(self, timeout_s: float = _PATIENCE_S) -> None:
        """Return once all replicas report, or after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while len(self._watch.latest) != self._replicas:
                    await asyncio.sleep(_PROBE_EVERY_S)

    def before(self) -> Before:
        """Return the fleet as it is now, for `wait` after a fault."""
        return Before(self._look(), frozenset(lives(self._watch.latest)))

    async def wait(
        self,
        since_s: float,
        replaces: str | None,
        before: Before,
        timeout_s: float,
    ) -> float | None:
        """Return the seconds from `since_s` to the first of some seconds in which all is well.

        Args:
            since_s: when the fault was done, or was undone.
            replaces: see `Kind`.
            before: the fleet before the fault. One of its processes of the replaced role must be
                gone: some outlive for a while what they cannot live without, as do reports.
            timeout_s: return None after this.
        """
        well_since: float | None = None
        while time.monotonic() < since_s + timeout_s:
            began_s = time.monotonic()
            if not await self._is_well(replaces, before):
                well_since = None
            elif well_since is None:
                well_since = began_s
            if well_since is not None and time.monotonic() - well_since > self._steady_s:
                return well_since - since_s
            await asyncio.sleep(_PROBE_EVERY_S)
        return None

    async def _is_well(self, replaces: str | None, before: Before) -> bool:
        if len(self._watch.latest) != self._replicas:
            return False
        if replaces is not None and not await asyncio.to_thread(
            self._is_replaced, replaces, before
        ):
            return False
        try:
            response = await self._client.get("/health", timeout=_HEALTH_TIMEOUT_S)
        except httpx.HTTPError:
            return False
        if response.status_code != 200:
            return False
        asked = await self._users.ask(0, stream=False, timeout_s=self._slow_s)
        return asked.outcome in ANSWERED

    def _is_replaced(self, role: str, before: Before) -> bool:
        if role in _WITH_ENGINE and not before.engines - lives(self._watch.latest):
            return False
        there = self._look()
        is_gone = role in _roles(before.processes - there)
        return is_gone and _roles(there)[role] >= self._roles[role]

    def left_over(self) -> str | None:
        """Return which processes are more or fewer than at the start, or None."""
        now = _roles(self._look())
        differences = {
            role: now[role] - self._roles[role]
            for role in sorted(now | self._roles)
            if now[role] != self._roles[role]
        }
        return f"processes more or fewer than before: {differences}" if differences else None
