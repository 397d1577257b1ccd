"""The score, term by term: two replicas that differ in one thing differ in one cost."""

import pytest

from adakv_serve.router.footprint import Footprint
from adakv_serve.router.score import ReplicaView, Score, Speeds, ranked, reason, score

# Powers of two, so that seconds are exact.
SPEEDS = Speeds(prefill_tokens_per_s=512.0, decode_step_s=1 / 32, decode_step_s_per_request=1 / 256)
REQUEST = Footprint(peak_blocks=40, steady_blocks=20, prompt_tokens=1024, output_tokens=64)
EMPTY = ReplicaView(
    "r", blocks_total=100, room_blocks=100, used_blocks=0, running=0, waiting=0, prefill_tokens=0
)


def cost(
    view: ReplicaView = EMPTY, footprint: Footprint = REQUEST, cached_tokens: int = 0
) -> Score:
    return score(view, footprint, cached_tokens, SPEEDS)


def test_an_empty_replica_costs_the_requests_own_prefill() -> None:
    assert cost() == Score("r", 0.0, 2.0, 0.0, 0, fits=True, possible=True)
    assert cost().total_s == 2.0


def test_the_total_is_the_sum_of_all_costs() -> None:
    assert Score("r", 1.0, 2.0, 4.0, 0, fits=True, possible=True).total_s == 7.0


@pytest.mark.parametrize(("room", "fits"), [(41, True), (40, True), (39, False)])
def test_a_request_fits_if_its_peak_does(room: int, fits: bool) -> None:
    full = cost(EMPTY._replace(room_blocks=room))
    assert full.fits is fits
    assert (full.memory_s == 0) is fits


def test_missing_blocks_come_back_over_a_prefill_and_half_of_a_decoding() -> None:
    full = EMPTY._replace(room_blocks=0, used_blocks=80)
    # 2 s, and 64 steps of 1/32 s, half of them over on average, for 40 of 80 blocks.
    assert cost(full) == cost()._replace(memory_s=1.5, fits=False)
    assert cost(full._replace(room_blocks=20)).memory_s == 0.75
    assert cost(full._replace(room_blocks=-40)).memory_s == 3.0


def test_more_used_blocks_come_back_sooner() -> None:
    full = EMPTY._replace(room_blocks=0)
    assert cost(full._replace(used_blocks=160)).memory_s == 0.75
    # A request waits for no more blocks than it needs.
    assert cost(full._replace(used_blocks=10)).memory_s == 3.0
    assert cost(full, REQUEST._replace(peak_blocks=1)).memory_s == 3.0


def test_blocks_come_back_later_from_longer_prompts_and_slower_decodings() -> None:
    full = EMPTY._replace(room_blocks=0, used_blocks=80)
    assert cost(full, REQUEST._replace(prompt_tokens=2048)).memory_s == 2.5
    assert cost(full, REQUEST._replace(output_tokens=128)).memory_s == 2.0
    assert cost(full, REQUEST._replace(output_tokens=0)).memory_s == 1 + 0.5 / 64
    # 8 requests more: a step takes twice as long.
    assert cost(full._replace(running=8)).memory_s == 2.0
    assert cost(full._replace(waiting=8)).memory_s == 2.0


def test_a_prefill_waits_for_those_before_it() -> None:
    assert cost(EMPTY._replace(prefill_tokens=512)) == cost()._replace(prefill_s=3.0)


@pytest.mark.parametrize(("cached", "seconds"), [(0, 2.0), (512, 1.0), (1024, 0.0), (2048, 0.0)])
def test_cached_tokens_are_not_computed_again(cached: int, seconds: float) -> None:
    assert cost(cached_tokens=cached) == cost()._replace(prefill_s=seconds, cached_tokens=cached)


@pytest.mark.parametrize("where", ["running", "waiting"])
def test_company_slows_every_token(where: str) -> None:
    assert cost(EMPTY._replace(**{where: 4})) == cost()._replace(decode_s=1.0)


@pytest.mark.parametrize(("total", "possible"), [(41, True), (40, True), (39, False)])
def test_a_request_is_possible_if_the_empty_replica_holds_it(total: int, possible: bool) -> None:
    assert cost(EMPTY._replace(blocks_total=total)) == cost()._replace(possible=possible)


def test_ranking_is_by_cost_but_what_can_never_hold_the_request_comes_last() -> None:
    cheap = Score("cheap", 0.0, 1.0, 0.0, 0, fits=True, possible=True)
    costly = cheap._replace(replica_id="costly", memory_s=9.0, fits=False)
    small = cheap._replace(replica_id="small", prefill_s=0.0, possible=False)
    equal = cheap._replace(replica_id="equal")
    order = [one.replica_id for one in ranked([small, costly, cheap, equal])]
    assert order == ["cheap", "equal", "costly", "small"]


FITTING = Score("best", 0.0, 1.0, 0.0, 0, fits=True, possible=True)
FULL = FITTING._replace(replica_id="full", fits=False)
WARM = FITTING._replace(replica_id="warm", cached_tokens=320)


@pytest.mark.parametrize(
    ("best", "others", "word"),
    [
        (FULL._replace(possible=False), [FULL], "fits_nowhere"),
        (FULL, [FULL, FULL], "least_wait"),
        (WARM, [FITTING, FITTING], "affinity"),
        (WARM, [FITTING, WARM], "least_cost"),
        (WARM, [], "affinity"),
        (FITTING, [FULL, FULL], "only_room"),
        (FITTING, [FULL, FITTING], "least_cost"),
        (FITTING, [], "least_cost"),
    ],
)
def test_the_reason_is_one_word(best: Score, others: list[Score], word: str) -> None:
    assert reason(best, others) == word
