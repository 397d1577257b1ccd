"""Engines on the GPU's path whose caches, or compressed pages, store fewer bits."""

import functools
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.adakv_worker.conversation import SESSIONS, Conversation
from tests.adakv_worker.eight_bits import (
    Paged,
    as_stored,
    assert_near_reference,
    attention_to,
    with_scales,
)
from tests.adakv_worker.engine.test_eviction import Traced, run
from tests.adakv_worker.engines import (
    Engine,
    Reference,
    assert_equals_reference,
    make_tiny_model,
    prompt,
)
from tests.adakv_worker.gpu import interpreted
from tests.adakv_worker.gpu.test_backends import (
    Kind,
    compressed_and_whole,
    run_with_a_move,
    started,
)

_TRITON, _FLASH = (Kind(name, use_v2=True, graphs=True) for name in ("Triton", "Flash"))
# Log-probabilities may differ by this on average.
_CLOSE = 0.03
# Bytes of an entry's keys in a head of 32 numbers, by format.
_BYTES = {
    "fp8": 32, "int8_per_token_head": 36, "fp8_per_token_head": 36, "int4_per_token_head": 20,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), heads=4, kv_heads=2, layers=2)


@pytest.fixture(scope="module", params=_BYTES)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(model: Path, form: str) -> Iterator[Engine]:
    with started(model, _TRITON, kv_cache_dtype=form) as engine:
        yield engine


@pytest.fixture(scope="module")
def reference(model: Path, form: str) -> Reference:
    return Reference(model, attention_to(form, as_stored))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype fp8 in FlashAttention"),
        ({"page_dtype": "int8", "block_size": 128}, "FlashAttention and a block_size over 64"),
    ],
)
def test_flash_attention_refuses_what_it_may_read_wrongly(
    model: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message), started(model, _FLASH, **options):
        pass


def test_a_block_takes_as_many_bytes_as_its_numbers_and_scales(engine: Engine, form: str) -> None:
    pool = engine.scheduler.kv_cache_manager.block_pool
    # Keys and values of two layers, two heads and 16 tokens.
    assert pool.num_gpu_blocks == (8 << 20) // (2 * 2 * 2 * 16 * _BYTES[form])


def test_compressed_and_whole_caches_in_one_batch(engine: Engine, reference: Reference) -> None:
    replayed = interpreted.graphs.replayed
    replayed.clear()
    for result in compressed_and_whole(engine):
        assert_near_reference(result, reference)
    # The graphs' kernels read and write such blocks, too.
    assert replayed


def test_evictions_while_answers_are_written(engine: Engine, reference: Reference) -> None:
    bound = {"adakv_decode_budget_tokens": 40, "adakv_decode_interval_tokens": 32}
    params = engine.params(max_tokens=36, extra_args=bound)
    traced = Traced(engine, "one", prompt(60, seed=5), params)
    run(engine, {"one": traced})
    result = traced.result
    assert result is not None
    assert result.proof is not None
    assert result.proof["decode_evictions"] == 1
    assert_near_reference(result, reference, traced.kept_at)


def test_the_first_write_to_a_layer_leaves_the_scales_of_others(model: Path) -> None:
    kind, form = Kind("Triton", use_v2=False), "int8_per_token_head"
    with started(model, kind, kv_cache_dtype=form, max_num_batched_tokens=256) as engine:
        # Each layer's entries are copied before the next layer has written any.
        engine.runner.adakv.state.held_bytes = 0
        (result,) = engine.run([prompt(150, seed=9)], engine.params(max_tokens=4))
    assert result.kept is not None
    assert_near_reference(result, Reference(model, attention_to(form, as_stored)))


def test_a_cache_leaves_with_its_scales(engine: Engine, reference: Reference) -> None:
    traced = Traced(engine, "moving", prompt(120, seed=7), engine.params(max_tokens=6))
    run_with_a_move(engine, traced)
    assert traced.result is not None
    assert_near_reference(traced.result, reference, traced.kept_at)


@pytest.mark.parametrize("use_v2", [True, False])
def test_scales_of_a_checkpoint_count(model: Path, tmp_path: Path, use_v2: bool) -> None:
    scales = (0.25, 0.125)
    scaled = with_scales(model, tmp_path / "scaled", scales)
    # The checkpoint says that its cache has eight bits.
    with started(scaled, Kind("Triton", use_v2=use_v2)) as engine:
        (result,) = engine.run([prompt(150, seed=9)], engine.params(max_tokens=4))
    assert result.kept is not None
    assert_near_reference(result, Reference(model, attention_to("fp8", as_stored, scales)))


@pytest.fixture(
    scope="module",
    params=[(_TRITON, "int8"), (_FLASH, "fp8"), (_FLASH, "int4")],
    ids=lambda given: f"{given[0]}-{given[1]}",
)
def paging(request: pytest.FixtureRequest, model: Path) -> Iterator[tuple[Engine, Paged]]:
    """An engine whose compressed pages store fewer bits than its blocks, and its reference."""
    kind, form = request.param
    with started(model, kind, page_dtype=form) as engine:
        store = functools.partial(as_stored, form=form)
        yield engine, Paged(model, form, store, store)


# A page has the bytes of 16 tokens with 32 numbers of four bytes.
PAGE_TOKENS = {"fp8": 64, "int8": 16 * 128 // 36, "int4": 16 * 128 // 20}


def test_compressed_prompts_lie_in_pages_of_fewer_bits(
    paging: tuple[Engine, Paged], request: pytest.FixtureRequest
) -> None:
    engine, paged = paging
    form = request.node.callspec.params["paging"][1]
    for result in compressed_and_whole(engine, (90, 300, 12)):
        assert result.proof is not None
        assert result.proof["page_tokens"] == PAGE_TOKENS[form]
        if result.kept is None:
            assert_equals_reference(result, paged.for_prompt_of(22), 1e-3)
        else:
            paged.assert_near(result)


def test_such_pages_are_evicted_from(paging: tuple[Engine, Paged]) -> None:
    engine, paged = paging
    bound = {"adakv_decode_budget_tokens": 40, "adakv_decode_interval_tokens": 32}
    params = engine.params(max_tokens=36, extra_args=bound)
    traced = Traced(engine, "one", prompt(150, seed=5), params)
    run(engine, {"one": traced})
    assert traced.result is not None
    assert traced.result.proof is not None
    assert traced.result.proof["decode_evictions"] == 1
    paged.assert_near(traced.result, traced.kept_at)


def test_such_pages_leave_with_their_scales(paging: tuple[Engine, Paged]) -> None:
    engine, paged = paging
    traced = Traced(engine, "moving", prompt(120, seed=7), engine.params(max_tokens=6))
    run_with_a_move(engine, traced)
    assert traced.result is not None
    paged.assert_near(traced.result, traced.kept_at)


def test_the_next_turn_goes_on_in_such_pages(model: Path) -> None:
    store = functools.partial(as_stored, form="int8")
    paged = Paged(model, "int8 turns", store, store)
    # Too little for a cache: it comes back from the host.
    sessions = {**SESSIONS, "share": 0.002, "host_bytes": 64 << 20}
    first = prompt(90, seed=31)
    with started(
        model, Kind("Triton", use_v2=True), sessions=sessions, page_dtype="int8"
    ) as engine:
        talk = Conversation(
            engine, paged.for_prompt_of(len(first)), _CLOSE, difference=statistics.fmean
        )
        talk.turn(first, max_tokens=6)
        talk.turn([*talk.tokens, *prompt(30, seed=32)], max_tokens=6)
        assert talk.resumed == 95
        assert talk.proof["session"]["source"] == "host"
        assert talk.proof["page_tokens"] == PAGE_TOKENS["int8"]
        engine.flush()
