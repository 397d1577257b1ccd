"""The environment of a CPU engine."""

import os

import pytest

from adakv_serve.serving.vllm_engine.host import set_up_cpu
from adakv_serve.serving.vllm_engine.options import computes_on_cpus

pytestmark = pytest.mark.skipif(not computes_on_cpus(), reason="vLLM computes on GPUs here")

CACHES = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *CACHES,
        "OMP_NUM_THREADS",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
    ):
        # Set first: what was not there is gone again afterwards.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_an_engine_without_compression_keeps_few_compiled_products() -> None:
    set_up_cpu(1, 1)
    # By themselves oneDNN and PyTorch keep 1,024.
    assert all(int(os.environ[name]) < 1024 for name in CACHES)


@pytest.mark.parametrize("name", CACHES)
def test_what_the_operator_has_set_stays(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "2000")
    set_up_cpu(1, 1)
    assert os.environ[name] == "2000"
