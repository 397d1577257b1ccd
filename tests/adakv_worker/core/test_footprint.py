"""Footprints that the router predicts, against plans and what the scheduler really holds."""

from typing import Any, NamedTuple

from hypothesis import example, given, settings
from hypothesis import strategies as st

from adakv_serve.router.footprint import Budget, Footprint, predict
from adakv_worker.config import CompressionConfig
from adakv_worker.core.plan import make_plan
from adakv_worker.options import RequestBudget, RequestOptions
from tests.adakv_worker.core.conftest import BLOCK_TOKENS
from tests.adakv_worker.fake_worker import CoreConfig, Fake

POOL = 999


def _config(most_budget: int | None = None) -> CompressionConfig:
    return CompressionConfig(
        budget_tokens=64, keep_ratio=0.0, min_budget_tokens=1, max_budget_tokens=most_budget
    )


class Asked(NamedTuple):
    """A prompt with so many answers, each of all its `outputs` tokens."""

    prompt: int
    outputs: int
    options: dict[str, Any]
    answers: int = 1
    most_budget: int | None = None

    @property
    def budget(self) -> RequestBudget:
        return RequestOptions.of(self.options).budget(_config(self.most_budget))

    def predicted(self) -> Footprint:
        budget = self.budget
        return predict(
            self.prompt,
            self.outputs,
            Budget(budget.budget_tokens, budget.keep_ratio, budget.decode, budget.limit),
            BLOCK_TOKENS,
            answers=self.answers,
            most_output_tokens=self.outputs,
        )


@st.composite
def asked(draw: st.DrawFn) -> Asked:
    options: dict[str, Any] = {
        "adakv_policy": "streaming_llm",
        "adakv_budget_tokens": draw(st.integers(1, 400)),
    }
    if draw(st.booleans()):
        options["adakv_keep_ratio"] = draw(st.floats(0.01, 1.0))
    if draw(st.booleans()):
        options["adakv_decode_budget_tokens"] = draw(st.integers(8, 300))
        options["adakv_decode_interval_tokens"] = draw(st.integers(16, 200))
    return Asked(draw(st.integers(1, 900)), draw(st.integers(1, 300)), options)


BORDERLINE = Asked(289, 2, {"adakv_policy": "streaming_llm", "adakv_budget_tokens": 257})


@example(BORDERLINE, None)
@given(asked(), st.one_of(st.none(), st.integers(400, 500)))
def test_a_footprint_is_that_of_the_plan(one: Asked, most_budget: int | None) -> None:
    one = one._replace(most_budget=most_budget)
    plan = make_plan(one.budget, one.prompt, one.outputs, BLOCK_TOKENS, POOL)
    predicted = one.predicted()
    # The last token of an answer is never cached.
    end = plan.blocks_at(one.prompt + one.outputs - 1)
    if plan.bound is not None:
        end = max(plan.blocks_at(one.prompt + more) for more in range(one.outputs))
    if not plan.active:
        end = -(-(one.prompt + one.outputs - 1) // BLOCK_TOKENS)
    slabs = plan.slabs if plan.active else 0
    assert predicted.steady_blocks == end
    assert predicted.peak_blocks == max(plan.prompt_blocks + slabs, end)


@settings(max_examples=80)
@example(BORDERLINE, 1)
@given(asked(), st.integers(1, 4))
def test_a_footprint_is_what_the_requests_really_hold(
    roomy: CoreConfig, one: Asked, answers: int
) -> None:
    one = one._replace(answers=answers)
    fake = Fake(roomy, in_flight=0)
    for _ in range(answers):
        fake.add(one.prompt, one.outputs, 0, one.options)
    fake.finish()
    predicted = one.predicted()
    # The first step computes the prompt.
    first, *later = fake.used_blocks
    assert max(first, *later) == predicted.peak_blocks
    assert max(later) == (predicted.steady_blocks if one.outputs > 1 else 0)
