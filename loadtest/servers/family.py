"""The processes of the deployment that this process has started, by what they are there for."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import psutil

# Parts of command lines, the first that is found. Nothing for processes of a measurement.
_ROLES = (
    ("VLLM::", "engine"), (":Engine", "replica"), (":Ingress", "ingress"),
    ("ServeController", "controller"), ("ProxyActor", "proxy"), ("HAProxy", "proxy"),
    ("EmbeddedStore", "store actor"), ("ray::IDLE", "idle worker"), ("valkey-server", "valkey"),
    ("router.inspect", ""), ("loadtest.servers.store", ""), ("multiprocessing.", "helper"),
)  # fmt: skip


class Member(NamedTuple):
    role: str
    process: psutil.Process


def family() -> Iterator[Member]:
    """Yield every process below this one that belongs to a deployment."""
    for process in psutil.Process().children(recursive=True):
        # It may end meanwhile.
        with suppress(psutil.Error):
            if role := role_of(process.cmdline()):
                yield Member(role, process)


def role_of(command: list[str]) -> str:
    """Return what a process of a deployment is there for; nothing for one of the measurement."""
    if not command:
        return ""
    line = " ".join(command[:4])
    for part, role in _ROLES:
        if part in line:
            return role
    program = next((part for part in command if part.endswith(".py")), command[0])
    return Path(program.split()[0]).stem
