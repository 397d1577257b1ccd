"""Budgets in bytes are the entries that so many bytes hold."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from adakv_worker.byte_budgets import settings_of
from adakv_worker.config import CompressionConfig
from adakv_worker.core.plan import make_plan
from adakv_worker.options import RequestOptions
from adakv_worker.plugin import engine_args
from adakv_worker.stored_dtypes import page_cache_dtype, page_tokens
from tests.adakv_worker.engines import make_tiny_model

# Two layers of two KV heads of 32 numbers, keys and values, of four bytes.
ENTRY_BYTES = 2 * 2 * 2 * 32 * 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"), heads=4, kv_heads=2, layers=2)


def _engine(model: Path, **compression: Any) -> VllmConfig:
    args = EngineArgs(
        str(model), dtype="float32", skip_tokenizer_init=True, **engine_args(compression)
    )
    return args.create_engine_config()


def test_bytes_for_fewer_entries_than_the_window_are_refused(model: Path) -> None:
    with pytest.raises(ValueError, match=r"budget_bytes=\d+ \(31 entries of each head\) is below"):
        settings_of(_engine(model, budget_bytes=32 * ENTRY_BYTES - 1))


@pytest.mark.parametrize(("page_dtype", "times"), [("auto", 1), ("fp8", 4), ("fp8_e5m2", 4)])
def test_as_many_bytes_hold_more_entries_of_fewer_bits(
    model: Path, page_dtype: str, times: int
) -> None:
    budget = {"budget_bytes": 100 * ENTRY_BYTES + ENTRY_BYTES // 8, "keep_bytes_ratio": 0.125}
    settings = settings_of(_engine(model, page_dtype=page_dtype, **budget))
    assert settings is not None
    assert (settings.budget_tokens, settings.keep_ratio) == (100 * times, 0.125 * times)
    asked = RequestOptions().budget(settings)
    plan = make_plan(asked, 4000, 100, 32, 10_000, page_tokens=32 * times)
    # As many slabs, but for the last page of each head.
    whole = 4000 * 0.125 * times
    assert plan.keep == whole
    assert plan.slabs == -(-int(whole + 32 * times - 1) // (32 * times))


# Numbers of keys and values, and a scale of four bytes for each.
@pytest.mark.parametrize(("page_dtype", "head_bytes"), [("int8", 2 * 36), ("int4", 2 * 20)])
def test_scales_count_among_the_bytes(model: Path, page_dtype: str, head_bytes: int) -> None:
    budget = {"budget_bytes": 100 * ENTRY_BYTES, "keep_bytes_ratio": 0.125}
    config = _engine(model, page_dtype=page_dtype, **budget)
    settings = settings_of(config)
    assert settings is not None
    # Two layers of two KV heads; whole entries have 256 bytes in each.
    assert settings.budget_tokens == 100 * ENTRY_BYTES // (4 * head_bytes)
    assert settings.keep_ratio == 0.125 * 256 / head_bytes
    assert page_tokens(config.model_config, 32, "auto", page_dtype) == 32 * 256 // head_bytes


def test_a_share_of_all_bytes_is_no_more_than_all_entries(model: Path) -> None:
    settings = settings_of(_engine(model, page_dtype="fp8", keep_bytes_ratio=0.5))
    assert settings is not None
    assert settings.keep_ratio == 1.0


@pytest.mark.parametrize(
    ("budget", "stands_for"),
    [
        ({"keep_bytes_ratio": 0.25}, "fp8"),
        ({"keep_bytes_ratio": 0.5, "budget_bytes": 100 * ENTRY_BYTES}, "fp8"),
        ({"keep_bytes_ratio": 0.75}, "auto"),
        ({"budget_bytes": 100 * ENTRY_BYTES}, "fp8"),
    ],
)
def test_bits_by_bytes_are_those_that_answered_best(
    model: Path, budget: dict[str, Any], stands_for: str
) -> None:
    chosen, given = (
        _engine(model, page_dtype=dtype, **budget) for dtype in ("by_bytes", stands_for)
    )
    assert settings_of(chosen) == settings_of(given)
    assert page_cache_dtype(chosen) == page_cache_dtype(given)


def test_bits_by_bytes_need_a_budget_in_bytes() -> None:
    with pytest.raises(ValidationError, match="needs budget_bytes or keep_bytes_ratio"):
        CompressionConfig(page_dtype="by_bytes")


def test_a_budget_below_one_entry_is_refused(model: Path) -> None:
    with pytest.raises(ValueError, match=f"budget_bytes=10 .*{ENTRY_BYTES}"):
        settings_of(_engine(model, budget_bytes=10))


@pytest.mark.parametrize(
    "both",
    [
        {"budget_tokens": 256, "budget_bytes": 1 << 20},
        {"keep_ratio": 0.5, "keep_bytes_ratio": 0.5},
    ],
)
def test_one_of_two_units_is_given(both: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="give one"):
        CompressionConfig(**both)
