"""Facts about a machine that decide whether and how the server runs on it."""

import importlib.metadata
import os
import platform
import resource
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

# vLLM chooses its attention kernels by these flags of `/proc/cpuinfo`.
_CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "asimd")


class Disk(NamedTuple):
    """Bytes of a file system."""

    total_bytes: int
    free_bytes: int


class Machine(NamedTuple):
    """Facts about a machine and the environment that this Python belongs to.

    gpus: names, as NVIDIA's driver has them.
    versions: of installed packages, by name.
    programs: those that were found, of those that a set-up needs.
    """

    python: tuple[int, int]
    cpu_features: frozenset[str]
    cores: int
    memory_bytes: int
    shared_memory: Disk
    gpus: tuple[str, ...]
    versions: dict[str, str]
    programs: frozenset[str]
    most_files: int

    @property
    def is_gpu(self) -> bool:
        return bool(self.gpus)


def look(packages: tuple[str, ...], programs: tuple[str, ...]) -> Machine:
    """Return the facts of this machine.

    Args:
        packages, programs: names to look for.
    """
    major, minor, _ = platform.python_version_tuple()
    shm = shutil.disk_usage("/dev/shm")
    return Machine(
        python=(int(major), int(minor)),
        cpu_features=_cpu_features(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        shared_memory=Disk(shm.total, shm.free),
        gpus=_gpus(),
        versions=_versions(packages),
        programs=frozenset(name for name in programs if shutil.which(name)),
        most_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    )


def _cpu_features() -> frozenset[str]:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    known = set(lines[0].split()) if lines else set()
    return frozenset(known.intersection(_CPU_FEATURES))


def _gpus() -> tuple[str, ...]:
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in done.stdout.splitlines() if line.strip())


def _versions(packages: tuple[str, ...]) -> dict[str, str]:
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
