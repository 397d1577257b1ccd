"""The environment of a CPU engine."""

import os

import pytest

from serving.vllm_engine.host import set_up_cpu
from serving.vllm_engine.options import computes_on_cpus

pytestmark = pytest.mark.skipif(not computes_on_cpus(), reason="vLLM computes on GPUs here")

CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        CACHE,
        "OMP_NUM_THREADS",
        "VLLM_CPU_OMP_THREADS_BIND",
        "VLLM_ENABLE_V1_MULTIPROCESSING",
    ):
        # Set first: what was not there is gone again afterwards.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def test_onednn_keeps_fewer_compiled_products_than_by_itself() -> None:
    set_up_cpu(1, 1)
    assert int(os.environ[CACHE]) < 1024  # oneDNN's own


def test_the_operators_cache_of_products_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE, "2000")
    set_up_cpu(1, 1)
    assert os.environ[CACHE] == "2000"
