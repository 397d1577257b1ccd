"""Ends and removes what a replica leaves when it is killed.

A killed process can clean up nothing, and its engine would go on for ever, so a small process
beside each replica waits for its end. This file is also that process' program.
"""

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

SPILL_PREFIX = "adakv-spill-"
_SHARED_MEMORY = Path("/dev/shm")
# Locks of Python's processes, and memory through which vLLM's workers talk.
_PREFIXES = ("sem.mp-", "psm_", "vllm_")


class Estate(NamedTuple):
    """What a replica has: processes by id and start (in ticks), files, and a folder for spill.

    Of that folder everything goes that no living replica has locked.
    """

    processes: list[tuple[int, int]]
    files: list[str]
    folder: str

    @classmethod
    def of(cls, process: psutil.Process, folder: str) -> "Estate":
        """Return what a process and its descendants have now."""
        children = process.children(recursive=True)
        files = {file for one in (process, *children) for file in _shared_files(one)}
        born = [(one.pid, _born(one.pid)) for one in children]
        return cls([(pid, at) for pid, at in born if at is not None], sorted(files), folder)


class Janitor:
    """Waits for the end of this process, in a process of its own, and then removes its estate.

    The end of this object counts as the end of the process.
    """

    def __init__(self, estate: Estate) -> None:
        # Its own session: what ends this process' group must not end it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(estate).encode() + b"\n")
        # It stays open, until the kernel closes it.
        self._process.stdin.flush()


def _born(pid: int) -> int | None:
    """Return when a process began, in ticks since the machine did; None if there is none."""
    with contextlib.suppress(OSError):
        # The second field, its name, may have spaces and brackets.
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    return None


def _shared_files(process: psutil.Process) -> Iterator[str]:
    with contextlib.suppress(psutil.Error, OSError):
        for mapping in process.memory_maps():
            path = Path(mapping.path)
            if path.parent == _SHARED_MEMORY and path.name.startswith(_PREFIXES):
                yield mapping.path


def remove_orphans(folder: Path) -> None:
    """Remove the spill files of replicas that were killed."""
    for left in folder.glob(f"{SPILL_PREFIX}*"):
        with contextlib.suppress(OSError):
            lock = os.open(left, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)


def clear(estate: Estate) -> None:
    """End the processes of an estate with all their descendants, and remove its files."""
    alive = list(_alive(estate))
    family = {child for one in alive for child in _with_descendants(one)}
    for process in family:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(family, timeout=10)
    for file in estate.files:
        with contextlib.suppress(OSError):
            os.unlink(file)
    remove_orphans(Path(estate.folder))


def _alive(estate: Estate) -> Iterator[psutil.Process]:
    for pid, begun in estate.processes:
        with contextlib.suppress(psutil.Error):
            # Another process may have the number by now.
            if _born(pid) == begun:
                yield psutil.Process(pid)


def _with_descendants(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return [process, *process.children(recursive=True)]
    return []


def _main() -> None:
    estate = Estate(*json.loads(sys.stdin.buffer.readline()))
    # Returns when the replica is gone.
    sys.stdin.buffer.read()
    clear(estate)


if __name__ == "__main__":
    _main()
