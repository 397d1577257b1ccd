"""The phases of a request, and what moves it from one to the next."""

from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adakv_worker.config import CompressionConfig
from adakv_worker.core.plan import Plan, make_plan
from adakv_worker.core.request import CompressedRequest, Phase
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


def _in(phase: Phase) -> CompressedRequest:
    request = CompressedRequest.planned(_plan())
    if phase is Phase.WHOLE:
        request.stay_whole("no_room")
    elif phase is not Phase.PREFILL:
        request.grow(200)
        request.reserve()
        if phase is Phase.COMPRESSED:
            request.compress(request.plan.slabs)
    assert request.phase is phase
    return request


@pytest.mark.parametrize(
    ("change", "starts_in"),
    [
        (lambda request: request.stay_whole("no_room"), Phase.PREFILL),
        (lambda request: (request.grow(200), request.reserve()), Phase.PREFILL),
        (lambda request: request.compress(5), Phase.RESERVED),
        (lambda request: request.hold(5), Phase.COMPRESSED),
    ],
    ids=["stay_whole", "reserve", "compress", "hold"],
)
def test_a_change_is_refused_in_every_other_phase(change: Any, starts_in: Phase) -> None:
    for phase in Phase:
        request = _in(phase)
        if phase is starts_in:
            change(request)
            continue
        with pytest.raises(AssertionError, match=phase.name):
            change(request)
        assert request.phase is phase


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
