"""What a fault is done to: a deployment, its store, and the choice among equal processes."""

import random
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from adakv_serve.loadtest.servers.family import family
from adakv_serve.loadtest.servers.store import ProxiedStore


class Scene(NamedTuple):
    """
    store_port: of the server. store: None if the deployment has started its own.
    hang_s: an answer that takes longer never comes.
    """

    url: str
    store_port: int
    model: str
    rng: random.Random
    hang_s: float
    store: ProxiedStore | None = None

    def one(self, role: str, without: str | None = None) -> psutil.Process:
        """Return a process of a role.

        Args:
            without: an argument that its command line must not have.

        Raises:
            LookupError: there is none.
        """
        found = [process for its, process in family() if its == role]
        fit = [process for process in found if without not in process.cmdline()]
        if not fit:
            raise LookupError(f"no process is there as {role}")
        return self.rng.choice(sorted(fit, key=lambda process: process.pid))

    @property
    def shared_memory(self) -> Path:
        """The deployment's `/dev/shm`, which may not be ours."""
        return Path("/proc", str(self.one("replica").pid), "root", "dev", "shm")


# Does a fault and returns once it is undone, where it is. Returns what it must not have seen.
Strike = Callable[[Scene], Coroutine[Any, Any, Sequence[str]]]
