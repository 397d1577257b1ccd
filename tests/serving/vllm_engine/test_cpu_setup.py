"""The environment of a CPU engine."""

import os

import pytest

from serving.vllm_engine.host import set_up_cpu

CACHE = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"


@pytest.fixture(autouse=True)
def restored_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.vllm_engine.host.computes_on_cpus", lambda: True)
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
