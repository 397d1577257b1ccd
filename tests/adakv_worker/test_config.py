"""The operator's settings and what a request may change of them."""

from typing import Any

import pytest
from pydantic import ValidationError

from adakv_worker.config import CompressionConfig, RequestOptions, compression_config
from adakv_worker.plan import make_plan

CONFIG = CompressionConfig(min_budget_tokens=64, max_budget_tokens=2048)


def test_the_default_keeps_half_and_at_least_the_budget() -> None:
    budget = RequestOptions.of(None).budget(CompressionConfig())
    assert [budget.keep_of(n) for n in (100, 400, 512, 4000)] == [100, 256, 256, 2000]


@pytest.mark.parametrize(
    ("given", "kept_of_1000"),
    [
        ({}, 500),
        ({"adakv_budget_tokens": 128}, 128),
        ({"adakv_keep_ratio": 0.25}, 250),
        ({"adakv_keep_ratio": 0.01}, 64),
        ({"adakv_keep_ratio": 0.1, "adakv_budget_tokens": 300}, 300),
        ({"somebody_else": 1, "adakv_budget_tokens": "200"}, 200),
    ],
)
def test_a_request_gets_what_it_names(given: dict[str, Any], kept_of_1000: int) -> None:
    assert RequestOptions.of(given).budget(CONFIG).keep_of(1000) == kept_of_1000


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"adakv_budget_tokens": 63}, "least"),
        ({"adakv_budget_tokens": 4096}, "most"),
        ({"adakv_budget_tokens": 0}, "greater than"),
        ({"adakv_keep_ratio": 0}, "greater than"),
        ({"adakv_keep_ratio": [1]}, "number"),
        ({"adakv_window_tokens": 200, "adakv_budget_tokens": 100}, "observation window"),
        ({"adakv_window_tokens": 8, "adakv_policy": "expected_attention"}, None),
        ({"adakv_policy": "nonsense"}, "known are"),
        ({"adakv_budget": 100}, "did you mean"),
    ],
)
def test_bad_values_name_themselves(given: dict[str, Any], reason: str | None) -> None:
    if reason is None:
        RequestOptions.of(given).budget(CONFIG)
        return
    with pytest.raises(ValueError, match=reason):
        RequestOptions.of(given).budget(CONFIG)


def test_the_operator_can_forbid_full() -> None:
    with pytest.raises(ValueError, match="full"):
        RequestOptions.of({"adakv_policy": "full"}).budget(CompressionConfig(allow_full=False))


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(ValidationError, match="budget_token"):
        compression_config({"adakv": {"budget_token": 1}})
    with pytest.raises(ValidationError, match="known are"):
        compression_config({"adakv": {"policy": "ada"}})
    assert compression_config({"adakv": {"enabled": False}}) is None
    assert compression_config({}) is None


def test_a_plan_is_made_by_arithmetic_alone() -> None:
    budget = RequestOptions.of({"adakv_budget_tokens": 128}).budget(CONFIG)
    plan = make_plan(budget, 1500, 100, 32, 200)
    assert (plan.skipped, plan.prompt_blocks, plan.slabs) == (None, 47, 5)
    assert plan.blocks_at(1500 + 33) == 6
    assert plan.longest_hit() == (1500 - 32) // 32 * 32
    assert make_plan(budget, 1500, 100, 32, 51).skipped == "no_room"
    assert make_plan(budget, 1500, 1, 32, 200).skipped == "no_decode"
    assert make_plan(budget, 140, 100, 32, 200).skipped == "frees_nothing"
    assert make_plan(budget, 128, 100, 32, 200).skipped == "within_budget"
