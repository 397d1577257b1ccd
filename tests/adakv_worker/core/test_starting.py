"""Whether a request may start beside others: each thing that it must leave room for."""

from typing import Any

import pytest

from adakv_worker.config import CompressionConfig
from adakv_worker.core.admission import Admission
from adakv_worker.core.plan import make_plan
from adakv_worker.core.request import CompressedRequest
from adakv_worker.options import RequestOptions

BLOCK, TOTAL = 16, 200
CONFIG = CompressionConfig(budget_tokens=64, keep_ratio=0.0, min_budget_tokens=1)
# 64 entries take five slabs.
SLABS = 5


class Pool:
    """As much of vLLM's block pool as admission reads."""

    def __init__(self, free: int) -> None:
        self.num_gpu_blocks = TOTAL + 1
        self.free = free

    def get_num_free_blocks(self) -> int:
        return self.free


class Core:
    """Requests beside which another one is to start."""

    def __init__(self, free: int) -> None:
        self.pool = Pool(free)
        self.blocks: dict[str, list[None]] = {}
        self.prefilling: dict[str, CompressedRequest] = {}
        self.compressed: dict[str, CompressedRequest] = {}
        pool: Any = self.pool
        blocks: Any = self.blocks
        self.admission = Admission(pool, BLOCK, blocks, self.prefilling, self.compressed)

    def prefills(self, name: str, held: int) -> None:
        self.blocks[name] = [None] * held
        self.prefilling[name] = a_request()

    def decodes(self, name: str, outputs: int = 100, decoded: int = 1, **options: Any) -> None:
        request = a_request(outputs=outputs, **options)
        request.grow(200)
        request.reserve()
        request.compress(request.plan.slabs)
        request.grow(200 + decoded)
        held = request.plan.blocks_at(200 + decoded)
        request.hold(held)
        self.blocks[name], self.compressed[name] = [None] * held, request
        self.admission.begin(name, request)

    def to_admit(self, request: CompressedRequest | None, needed: int = 13) -> int:
        slabs = request.plan.slabs if request is not None else 0
        return self.admission.blocks_to_admit("new", request, needed, slabs)

    @property
    def waits(self) -> bool:
        return self.to_admit(a_request()) > TOTAL


def a_request(prompt: int = 200, outputs: int = 100, **options: Any) -> CompressedRequest:
    """Return a request whose prompt takes 13 blocks."""
    named = {f"adakv_{name}": value for name, value in options.items()}
    budget = RequestOptions.of(named).budget(CONFIG)
    return CompressedRequest.planned(make_plan(budget, prompt, outputs, BLOCK, TOTAL))


def test_an_empty_core_asks_for_no_more_than_the_prompt() -> None:
    assert Core(free=TOTAL).to_admit(a_request()) == 13
    assert Core(free=TOTAL).to_admit(None) == 13


@pytest.mark.parametrize("request_", [None, a_request()], ids=["whole", "compressed"])
def test_half_prefilled_prompts_keep_what_was_promised_to_them(
    request_: CompressedRequest | None,
) -> None:
    core = Core(free=TOTAL)
    core.prefills("half", held=5)
    core.prefills("nearly", held=12)
    assert core.to_admit(request_) == 13 + (8 + SLABS) + (1 + SLABS)


def test_blocks_that_one_has_too_many_are_nobody_elses() -> None:
    core = Core(free=TOTAL)
    core.prefills("half", held=5)
    # It goes on from a longer cache, which it cuts.
    core.prefills("resumed", held=60)
    assert core.to_admit(a_request()) == 13 + (8 + SLABS)


def test_a_prompt_that_has_begun_is_not_promised_to_itself() -> None:
    core = Core(free=TOTAL)
    core.prefills("new", held=5)
    assert core.to_admit(a_request(), needed=8) == 8


@pytest.mark.parametrize(
    ("decoded", "grows"), [(17, 1), (14, 1), (13, 0)], ids=["next step", "fourth step", "later"]
)
def test_others_may_grow_while_a_prompt_is_computed(decoded: int, grows: int) -> None:
    core = Core(free=TOTAL)
    # Six blocks surely hold 64 entries and 17 more.
    core.decodes("other", decoded=decoded)
    assert core.to_admit(a_request()) == 13 + grows
    assert core.admission.blocks_to_admit("other", a_request(), 13) == 13


def test_one_that_is_about_to_evict_does_not_grow() -> None:
    bound = {"decode_budget_tokens": 64, "decode_interval_tokens": 32}
    # It has 94 entries in blocks for 97, and no more than 96 if it is bounded.
    for options, grows in ((bound, 0), ({}, 1)):
        core = Core(free=TOTAL)
        core.decodes("other", decoded=30, **options)
        assert core.to_admit(a_request()) == 13 + grows


def test_growth_is_left_only_by_requests_that_will_be_compressed() -> None:
    core = Core(free=TOTAL)
    core.decodes("other", decoded=16)
    assert core.to_admit(None) == 13


def _crowded(free: int, running: int = 20) -> Core:
    """Return a core where requests decode that may go on for long."""
    core = Core(free)
    for index in range(running):
        core.decodes(f"r{index}", outputs=1000)
    return core


def _learn(core: Core, *lengths: int) -> None:
    for _ in range(64 // len(lengths)):
        for length in lengths:
            core.admission.answer_lengths.note(1000, length)


def test_a_request_starts_where_all_will_fit_until_it_ends() -> None:
    core = _crowded(free=100)
    _learn(core, 40)
    assert not core.waits


def test_a_request_waits_where_the_others_would_overflow_before_it_ends() -> None:
    core = _crowded(free=100)
    # In its 100 steps they come to 20 times 164 tokens: 200 blocks hold 3,200.
    _learn(core, 700)
    assert core.waits


def test_uncertain_lengths_need_more_room_than_certain_ones() -> None:
    certain, uncertain = _crowded(free=100), _crowded(free=100)
    _learn(certain, 190)
    _learn(uncertain, 10, 370)
    # Both expect 190 tokens of each answer.
    means = [
        core.admission.answer_lengths.one_to_come(core.compressed["r0"].life._replace(answered=0))
        for core in (certain, uncertain)
    ]
    assert [mean for mean, _ in means] == [190, 190]
    assert [spread for _, spread in means] == [0, 180]
    growth = [core.admission.growth_blocks() for core in (certain, uncertain)]
    assert growth[0] < growth[1]


@pytest.mark.parametrize(("missing", "waits"), [(1, True), (0, False)])
def test_a_request_waits_for_room_for_its_slabs(missing: int, waits: bool) -> None:
    # Room for its prompt, for each of the others to grow, and for five slabs.
    core = _crowded(free=13 + 10 + SLABS - missing, running=10)
    _learn(core, 2)
    assert core.waits is waits
