"""The operator's settings and what a request may change of them."""

from typing import Any

import pytest
from pydantic import ValidationError

from adakv_serve.kernels.blocks import DecodeBound
from adakv_worker.config import CompressionConfig, compression_config
from adakv_worker.core.plan import make_plan
from adakv_worker.options import RequestOptions, budget_of

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
        ({"adakv_window_tokens": 33}, "most, 32"),
        ({"adakv_window_tokens": 30_000}, "most, 32"),
        ({"adakv_window_tokens": 32, "adakv_policy": "key_norm"}, "most, 0"),
        ({"adakv_keep_ratio": float("nan")}, "adakv_keep_ratio"),
        ({"adakv_policy": "\ud83d" * 1000}, "unknown policy"),
        ({"adakv_" + "x" * 1000: 1}, "unknown option"),
        ({"adakv_window_tokens": 8, "adakv_policy": "expected_attention"}, None),
        ({"adakv_policy": "nonsense"}, "known are"),
        ({"adakv_budget": 100}, "did you mean"),
        ({"adakv_detail": True}, "adakv_detail: this server does not allow it"),
        ({"adakv_detail": False}, None),
    ],
)
def test_bad_values_name_themselves(given: dict[str, Any], reason: str | None) -> None:
    if reason is None:
        RequestOptions.of(given).budget(CONFIG)
        return
    with pytest.raises(ValueError, match=reason):
        RequestOptions.of(given).budget(CONFIG)


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"budget_tokens": 16}, "budget_tokens=16"), ({"window_tokens": 300}, "budget_tokens=256")],
)
def test_a_budget_below_the_window_is_refused_at_once(settings: Any, named: str) -> None:
    with pytest.raises(ValidationError, match=f"{named} is below the observation window"):
        CompressionConfig(**settings)
    CompressionConfig(**settings, policy="full")
    with pytest.raises(ValidationError, match="alpha"):
        CompressionConfig(policy="snapkv", alpha=0.5, budget_bytes=1 << 20)


def test_another_policy_gets_the_budget_that_it_needs() -> None:
    config = CompressionConfig(policy="key_norm", budget_tokens=2)
    asked = RequestOptions.of({"adakv_policy": "snapkv"}).budget(config)
    assert asked.budget_tokens == 32
    narrow = CompressionConfig(policy="snapkv", budget_tokens=32, max_window_tokens=128)
    with pytest.raises(ValueError, match="adakv_window_tokens=100 is above the budget of 32"):
        RequestOptions.of({"adakv_window_tokens": 100}).budget(narrow)


def test_the_operator_can_forbid_full() -> None:
    with pytest.raises(ValueError, match="full"):
        RequestOptions.of({"adakv_policy": "full"}).budget(CompressionConfig(allow_full=False))


def test_forbidding_full_forbids_keeping_all_by_a_ratio() -> None:
    config = CompressionConfig(allow_full=False)
    with pytest.raises(ValueError, match="adakv_keep_ratio"):
        RequestOptions.of({"adakv_keep_ratio": 1.0}).budget(config)
    # Nor is nearly all: nothing goes beyond what the operator's own settings keep.
    for given in ({"adakv_keep_ratio": 0.99}, {"adakv_budget_tokens": 10**9}):
        budget = RequestOptions.of(given).budget(config)
        assert budget.keep_of(1000) == 500
        assert "at most 500" in (budget.why_less(1000) or "")


def test_no_ratio_goes_beyond_the_most_tokens() -> None:
    config = CompressionConfig(keep_ratio=0.1, max_budget_tokens=512)
    budget = RequestOptions.of({"adakv_keep_ratio": 0.9}).budget(config)
    # Where the operator's own settings keep more, so may a request.
    assert [budget.keep_of(n) for n in (400, 1000, 10_000)] == [360, 512, 1000]
    assert budget.why_less(400) is None


@pytest.mark.parametrize(
    ("settings", "given", "reason"),
    [
        ({"max_window_tokens": 6000}, {"adakv_window_tokens": 600, "adakv_keep_ratio": 0.1},
         "budget_tokens=600 is above"),
        ({"max_window_tokens": 6000, "decode_budget_tokens": 512},
         {"adakv_window_tokens": 510, "adakv_budget_tokens": 512}, "budget_tokens=514 is above"),
        ({"max_window_tokens": 6000, "decode_budget_tokens": 512, "max_budget_tokens": None},
         {"adakv_window_tokens": 2000, "adakv_budget_tokens": 3000},
         "decode_interval_tokens=2000 is above"),
    ],
)  # fmt: skip
def test_bounds_hold_for_what_options_come_to_together(
    settings: dict[str, Any], given: dict[str, Any], reason: str
) -> None:
    config = CompressionConfig(**{"max_budget_tokens": 512, **settings})
    with pytest.raises(ValueError, match=reason):
        RequestOptions.of(given).budget(config)


def test_the_operators_own_settings_are_within_any_bounds() -> None:
    config = CompressionConfig(
        budget_tokens=300, max_budget_tokens=100, max_window_tokens=8, allow_full=False,
        decode_budget_tokens=300, decode_interval_tokens=5000,
    )  # fmt: skip
    budget = RequestOptions().budget(config)
    assert (budget.keep_of(400), budget.decode) == (300, DecodeBound(300, 5000))


def test_what_is_forbidden_gets_the_operators_settings_where_it_gets_through() -> None:
    config = CompressionConfig(keep_ratio=0.0, max_budget_tokens=512, allow_full=False)
    for given in ({"adakv_policy": "full"}, {"adakv_budget_tokens": 513}, {"adakv_nonsense": 1}):
        budget = budget_of(given, config, {})
        assert (budget.choice.preset, budget.keep_of(1000)) == ("auto", 256)
        assert next(iter(given)).split("=")[0] in (budget.fallback or "")


def test_an_unsupported_policy_is_answered_with_the_operators() -> None:
    config = CompressionConfig(policy="snapkv")
    unsupported = {"expected_attention": "no rotary embedding", "defensive": "no projection"}
    given = {"adakv_policy": "expected_attention", "adakv_budget_tokens": 100}
    budget = budget_of(given, config, unsupported)
    assert (budget.choice.preset, budget.keep_of(1000)) == ("snapkv", 100)
    assert "expected_attention" in (budget.fallback or "")
    assert "no rotary embedding" in (budget.fallback or "")
    auto = budget_of({"adakv_policy": "auto", "adakv_keep_ratio": 0.5}, config, unsupported)
    assert auto.fallback is None
    assert auto.choice_for(500, 1000).preset == "kv_compress"


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
    assert plan.longest_hit == (1500 - 32) // 32 * 32
    assert make_plan(budget, 1500, 100, 32, 51).skipped == "no_room"
    assert make_plan(budget, 1500, 1, 32, 200).skipped == "no_decode"
    assert make_plan(budget, 140, 100, 32, 200).skipped == "frees_nothing"
    assert make_plan(budget, 128, 100, 32, 200).skipped == "within_budget"


def test_where_the_operator_allows_it_a_plan_has_the_detail_that_a_request_asks_for() -> None:
    config = CompressionConfig(allow_detail=True)
    for given, expected in (({"adakv_detail": 1}, True), ({}, False)):
        assert make_plan(budget_of(given, config, {}), 1000, 50, 32, 999).detail is expected
