import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

# The duration of an example depends on the machine more than on the code.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# No test may depend on a model hub, or wait for one.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

_HERE = Path(__file__).parent
# Whatever uses one of these fixtures, or lies in one of these folders, starts an engine.
_ENGINE_FIXTURES = {"in_process", "gqa_model"}
_ENGINE_FOLDERS = {_HERE / "adakv_worker" / "engine", _HERE / "adakv_worker" / "gpu"}
# One process runs a file: the longest go first, so that the other process is not left idle.
_LONGEST_FILES = {"test_gate.py", "test_processes.py", "test_gpu_path.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that start an engine or the running application, and put the longest first."""
    items.sort(key=lambda item: item.path.name not in _LONGEST_FILES)
    for item in items:
        if _HERE / "system" in item.path.parents:
            item.add_marker("cluster")
        elif _ENGINE_FIXTURES & set(getattr(item, "fixturenames", ())) or (
            _ENGINE_FOLDERS & set(item.path.parents)
        ):
            item.add_marker("engine")


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
