from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adakv_worker.engines import Engine, Reference, make_tiny_model


@pytest.fixture(scope="session")
def in_process() -> Iterator[None]:
    """Engines whose scheduler and worker the tests can look into."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        patch.setenv("VLLM_LOGGING_LEVEL", "WARNING")
        yield


@pytest.fixture(scope="session")
def gqa_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("gqa"), heads=6, kv_heads=2)


@pytest.fixture(scope="module")
def engine(in_process: None, gqa_model: Path) -> Iterator[Engine]:
    """Compresses to 48 entries, whatever the prompt."""
    engine = Engine(
        gqa_model,
        {
            "budget_tokens": 48, "keep_ratio": 0.0, "window_tokens": 16,
            "max_budget_tokens": 100_000,
        },
    )  # fmt: skip
    yield engine
    engine.assert_nothing_leaked()
    engine.close()


@pytest.fixture(scope="session")
def reference(gqa_model: Path) -> Reference:
    return Reference(gqa_model)
