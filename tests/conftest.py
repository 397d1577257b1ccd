from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# How long an example takes says more of the machine than of the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


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
    # Imported here: most tests need neither torch nor transformers.
    from tests.adakv_worker.engines import make_tiny_model

    return make_tiny_model(tmp_path_factory.mktemp("gqa"), heads=6, kv_heads=2)
