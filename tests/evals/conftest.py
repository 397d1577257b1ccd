from collections.abc import Iterator

import pytest

from adakv_serve.evals.answering.engine import ForcedEngine
from adakv_serve.serving.models.embedded import embedded_model_path


@pytest.fixture(scope="module")
def embedded_engine(in_process: None) -> Iterator[ForcedEngine]:
    """Start an engine of the embedded model."""
    engine = ForcedEngine(embedded_model_path(), 2048, 512 << 20)
    yield engine
    engine.close()
