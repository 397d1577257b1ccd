from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.adakv_worker.engines import Engine, Reference


@pytest.fixture(scope="module")
def engine(in_process: None, gqa_model: Path) -> Iterator[Engine]:
    """Return an engine that compresses every prompt to 48 entries."""
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
