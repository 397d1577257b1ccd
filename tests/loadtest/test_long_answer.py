from pathlib import Path

import pytest

from adakv_serve.loadtest.long_answer import Written, arms, at_equal_distances, write


def test_the_arms_differ_in_the_bound() -> None:
    assert arms("snapkv", 128) == {
        "unbounded": {"adakv_policy": "full"},
        "bounded": {"adakv_policy": "snapkv", "adakv_decode_budget_tokens": 128},
    }
    assert arms(None, 128)["bounded"] == {"adakv_decode_budget_tokens": 128}


@pytest.mark.parametrize("count", [0, 1, 15, 16, 33, 4000])
def test_a_report_has_few_points(count: int) -> None:
    points = at_equal_distances(range(count))
    assert points == sorted(points)
    assert min(count, 16) <= len(points) <= 32
    assert points[:1] == [0][:count]


def test_a_report_names_the_arm() -> None:
    assert Written(9, 4.5, [1, 2], 3, "text").report("bounded") == (
        "bounded: 9 tokens, 4.5 tokens/s, 3 evictions, blocks held [1, 2]\ntext\n"
    )


@pytest.mark.slow
def test_a_bounded_answer_holds_fewer_blocks(in_process: None, gqa_model: Path) -> None:
    from tests.adakv_worker.engines import Engine, prompt

    engine = Engine(gqa_model, {"policy": "snapkv"})
    both = arms("snapkv", 128)
    written = {name: write(engine.llm, prompt(96), 500, options) for name, options in both.items()}
    engine.close()
    free, bound = written["unbounded"], written["bounded"]
    assert (free.tokens, bound.tokens) == (500, 500)
    assert free.evictions == 0 < bound.evictions
    assert free.held_blocks == sorted(free.held_blocks)
    assert bound.held_blocks[-1] < free.held_blocks[-1]
