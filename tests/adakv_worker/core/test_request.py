"""The phases of a request, and what moves it from one to the next."""

from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adakv_worker.config import CompressionConfig
from adakv_worker.core.floor import Floor
from adakv_worker.core.held import Held
from adakv_worker.core.plan import Plan, make_plan
from adakv_worker.core.request import CompressedRequest, Phase
from adakv_worker.core.sessions import with_held
from adakv_worker.options import RequestOptions

CONFIG = CompressionConfig(budget_tokens=64, keep_ratio=0.0, min_budget_tokens=1)
BLOCK = 16


def _plan(prompt: int = 200, outputs: int = 100, **options: Any) -> Plan:
    named = {f"adakv_{name}": value for name, value in options.items()}
    return make_plan(RequestOptions.of(named).budget(CONFIG), prompt, outputs, BLOCK, 1000)


class Requests(RuleBasedStateMachine):
    """A request as a manager moves it: blocks for more and more tokens, then slabs."""

    @initialize(prompt=st.integers(1, 400), bound=st.sampled_from([None, 64]))
    def plan(self, prompt: int, bound: int | None) -> None:
        options = {} if bound is None else {"decode_budget_tokens": bound}
        self.request = CompressedRequest.planned(_plan(prompt, **options))
        self.tokens = 0
        self.slabs = 0

    @rule(more=st.integers(1, 60))
    def grow(self, more: int) -> None:
        limit = self.request.plan.prompt_tokens if self.request.phase is Phase.PREFILL else 500
        self.tokens = max(self.tokens, min(self.tokens + more, limit))
        self.request.grow(self.tokens)

    @precondition(lambda self: self.request.phase is Phase.PREFILL)
    @rule()
    def reserve(self) -> None:
        if self.tokens >= self.request.plan.prompt_tokens:
            self.request.reserve()
            assert self.request.phase is Phase.RESERVED
            return
        with pytest.raises(AssertionError, match="not complete"):
            self.request.reserve()

    @precondition(lambda self: self.request.phase is Phase.PREFILL)
    @rule()
    def stay_whole(self) -> None:
        self.request.stay_whole("no_room")
        assert self.request.phase is Phase.WHOLE
        assert self.request.plan.skipped == "no_room"

    @precondition(lambda self: self.request.phase is Phase.RESERVED)
    @rule()
    def compress(self) -> None:
        self.slabs = self.request.plan.slabs
        self.request.compress(self.slabs)
        assert self.request.phase is Phase.COMPRESSED

    @precondition(lambda self: self.request.phase is Phase.COMPRESSED)
    @rule()
    def hold(self) -> None:
        self.slabs = max(self.slabs, self.request.plan.blocks_at(self.tokens))
        self.request.hold(self.slabs)

    @rule()
    def fall_back(self) -> None:
        before = self.request.phase
        self.request.fall_back()
        assert self.request.phase is before
        assert "failed" in (self.request.plan.fallback or "")

    @invariant()
    def only_a_request_that_is_skipped_is_whole(self) -> None:
        assert (self.request.phase is Phase.WHOLE) == (not self.request.plan.active)

    @invariant()
    def its_slabs_hold_all_tokens_that_it_has_room_for(self) -> None:
        if self.request.room_tokens:
            plan, room = self.request.plan, self.request.room_tokens
            if plan.bound is None:
                assert plan.blocks_at(room) <= self.slabs < plan.blocks_at(room + 1)


TestRequests = Requests.TestCase


def _resumed_plan(tokens: int = 140, **options: Any) -> Plan:
    held = Held(
        "h", None, np.arange(tokens + 10, dtype=np.int32), tokens + 10, Floor(120, 40), 130, (),
        turn=1,
    )  # fmt: skip
    return with_held(_plan(**options), held, tokens, newest_only=True)


def _in(phase: Phase) -> CompressedRequest:
    plan = _resumed_plan() if phase is Phase.RESUMED else _plan()
    request = CompressedRequest.planned(plan)
    if phase is Phase.WHOLE:
        request.stay_whole("no_room")
    elif phase not in (Phase.PREFILL, Phase.RESUMED):
        request.grow(200)
        request.reserve()
        if phase is Phase.COMPRESSED:
            request.compress(request.plan.slabs)
    assert request.phase is phase
    return request


@pytest.mark.parametrize(
    ("change", "starts_in"),
    [
        (lambda request: request.stay_whole("no_room"), {Phase.PREFILL}),
        (lambda request: (request.grow(200), request.reserve()), {Phase.PREFILL}),
        (lambda request: request.compress(5), {Phase.RESERVED, Phase.RESUMED}),
        (lambda request: request.hold(5), {Phase.COMPRESSED, Phase.RESUMED}),
    ],
    ids=["stay_whole", "reserve", "compress", "hold"],
)
def test_a_change_is_refused_in_every_other_phase(change: Any, starts_in: set[Phase]) -> None:
    for phase in Phase:
        request = _in(phase)
        if phase in starts_in:
            change(request)
            continue
        with pytest.raises(AssertionError, match=phase.name):
            change(request)
        assert request.phase is phase


def test_a_resumed_request_counts_from_its_cache() -> None:
    request = _in(Phase.RESUMED)
    # 60 entries at 140 tokens, and 60 more; of those since token 130 a window stays beside 50.
    assert request.blocks_at(140) == (60 + 15 + 15) // 16
    assert request.blocks_at(200) == request.blocks_to_start == (120 + 15 + 15) // 16
    assert (request.plan.keep, request.plan.slabs) == (82, (82 + 15 + 15) // 16)
    request.grow(200)
    assert request.completes_prompt
    request.compress(request.plan.slabs)
    # The window of 32 tokens is whole.
    assert (request.floor, request.compressed_at) == (Floor(168, 50), 200)


def test_a_short_turn_narrows_the_window_of_its_own_prompt_only() -> None:
    bound = {"decode_budget_tokens": 64, "decode_interval_tokens": 40}
    plan = _resumed_plan(198, **bound)
    assert plan.resumed is not None
    assert plan.resumed.choice.build().scorer.window_tokens == plan.query_span == 2
    # Its answer's evictions look at as many queries as those of other requests.
    assert plan.eviction_span == _plan(**bound).eviction_span == 32
    request = CompressedRequest.planned(plan)
    request.grow(200)
    request.compress(plan.slabs)
    assert request.floor == Floor(198, plan.keep - 2)
    assert request.next_eviction is not None
    request.grow(request.next_eviction)
    request.note_eviction(plan.slabs_after_eviction)
    assert request.floor == Floor(request.num_tokens - 32, 64 - 32)


def test_a_policy_that_failed_leaves_nothing_to_cut() -> None:
    request = _in(Phase.RESERVED)
    request.fall_back()
    request.compress(5)
    assert request.floor == Floor(200, 64)
    late = _in(Phase.COMPRESSED)
    assert late.floor == Floor(168, 32)
    late.fall_back()
    assert late.floor == Floor(200, 64)


def test_a_request_never_loses_tokens() -> None:
    request = _in(Phase.COMPRESSED)
    request.grow(210)
    with pytest.raises(AssertionError, match="lost tokens"):
        request.grow(209)


def test_a_request_starts_with_its_prompt_or_with_its_cache() -> None:
    planned = CompressedRequest.planned(_plan())
    assert (planned.start_tokens, planned.blocks_to_start) == (200, 13 + 5)
    whole = CompressedRequest.planned(_plan(policy="full"))
    assert (whole.phase, whole.start_tokens, whole.blocks_to_start) == (Phase.WHOLE, 200, 13)
    # 64 entries of its prompt and 30 since.
    arriving = CompressedRequest.arriving(_plan(), 230)
    assert arriving.phase is Phase.COMPRESSED
    assert (arriving.start_tokens, arriving.blocks_to_start) == (230, (94 + 15 + 15) // 16)


def test_a_bounded_request_evicts_whenever_it_has_grown_to_its_bound() -> None:
    request = CompressedRequest.planned(_plan(decode_budget_tokens=64, decode_interval_tokens=40))
    request.grow(200)
    request.reserve()
    request.compress(request.plan.slabs)
    evictions = []
    for tokens in range(201, 301):
        expected = request.next_eviction
        request.grow(tokens)
        if request.evicts:
            evictions.append(tokens)
            assert expected == tokens
    assert evictions == [240, 280]
    # The answer ends before the next one.
    assert request.next_eviction is None
