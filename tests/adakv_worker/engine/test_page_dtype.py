"""Engines whose compressed prompts lie in pages of eight bits, beside whole ones in full."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adakv_serve.kernels.blocks import compressed_blocks_bound
from adakv_serve.kernels.policies.presets import PRESETS
from tests.adakv_worker.eight_bits import FORMATS, Paged, towards_zero
from tests.adakv_worker.engine.test_eviction import BOUND, Traced
from tests.adakv_worker.engine.test_eviction import run as run_traced
from tests.adakv_worker.engine.test_moves import go_on, leave, run
from tests.adakv_worker.engines import Engine, assert_equals_reference, prompt

pytestmark = pytest.mark.skipif(
    not torch.cpu._is_avx512_supported(), reason="vLLM's fp8 kernels for CPUs need AVX-512"
)

COMPRESSION = {
    "budget_tokens": 48, "keep_ratio": 0.0, "window_tokens": 16, "max_budget_tokens": 100_000,
    "sessions": {"enabled": True, "min_saved_tokens": 1},
}  # fmt: skip
# Entries of a page: a block has 32 tokens of four bytes a number.
PAGE = 128


@pytest.fixture(scope="module", params=FORMATS)
def form(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(in_process: None, gqa_model: Path, form: str) -> Iterator[Engine]:
    engine = Engine(gqa_model, {**COMPRESSION, "page_dtype": form})
    yield engine
    engine.assert_nothing_leaked()
    engine.close()


@pytest.fixture(scope="module")
def paged(gqa_model: Path, form: str) -> Paged:
    dtype = FORMATS[form]
    return Paged(
        gqa_model,
        form,
        kept=lambda numbers: numbers.to(dtype).float(),
        new=lambda numbers: towards_zero(numbers, dtype),
    )


def asking(engine: Engine, max_tokens: int = 24, **options: Any) -> Any:
    given = {f"adakv_{name}": value for name, value in options.items()}
    return engine.params(max_tokens=max_tokens, extra_args=given)


@pytest.mark.parametrize("policy", PRESETS)
def test_every_preset_answers_as_the_reference(engine: Engine, paged: Paged, policy: str) -> None:
    results = engine.run(
        [prompt(length, seed=length) for length in (200, 333, 700)],
        asking(engine, policy=policy, budget_tokens=48),
    )
    for result in results:
        assert result.proof is not None
        assert (result.proof["policy"], result.proof["kept_mean"]) == (policy, 48)
        paged.assert_near(result)


def test_a_block_holds_four_times_the_entries(engine: Engine, paged: Paged) -> None:
    (result,) = engine.run([prompt(900, seed=1)], asking(engine, budget_tokens=300))
    assert result.proof is not None
    assert result.proof["page_tokens"] == PAGE
    assert result.proof["blocks_after"] == compressed_blocks_bound(300, 0, PAGE) == 4
    paged.assert_near(result)


def test_a_prompt_within_its_budget_keeps_all_entries_in_fewer_blocks(
    engine: Engine, paged: Paged
) -> None:
    long, short = engine.run(
        [prompt(700, seed=2), prompt(20, seed=3)], asking(engine, budget_tokens=2000)
    )
    assert long.proof is not None
    assert (long.proof["skipped"], long.proof["kept_min"]) == (None, 700)
    assert long.proof["blocks_after"] == compressed_blocks_bound(700, 0, PAGE) == 7
    paged.assert_near(long)
    assert short.proof is not None
    assert short.proof["skipped"] == "frees_nothing"


def test_whole_requests_are_exact_beside_compressed_ones(engine: Engine, paged: Paged) -> None:
    ids = [prompt(length, seed=length) for length in (150, 400, 260, 90)]
    params = [
        asking(engine, max_tokens=40, **({"policy": "full"} if number % 2 else {}))
        for number in range(4)
    ]
    results = engine.run(ids, params)
    for number, result in enumerate(results):
        if number % 2:
            everything = len(result.prompt) + len(result.tokens)
            reference = paged.for_prompt_of(everything)
            assert_equals_reference(result, reference, 1e-3)
        else:
            paged.assert_near(result)


def test_every_step_of_a_bounded_request_attends_to_the_kept_entries(
    engine: Engine, paged: Paged
) -> None:
    params = engine.params(max_tokens=100, extra_args={**BOUND, "adakv_budget_tokens": 48})
    requests = {
        f"{length}": Traced(engine, f"{length}", prompt(length, seed=length), params)
        for length in (160, 300)
    }
    run_traced(engine, requests)
    for traced in requests.values():
        assert traced.result is not None
        paged.assert_near(traced.result, traced.kept_at)


@pytest.mark.parametrize("after", [12, 33])
def test_a_moved_cache_goes_on_as_if_it_had_stayed(
    engine: Engine, after: int, tmp_path: Path
) -> None:
    ids = prompt(500, seed=42)
    params = engine.params(max_tokens=80, extra_args={**BOUND, "adakv_session": "off"})
    engine.llm.llm_engine.add_request("staying", {"prompt_token_ids": ids}, params)
    staying = run(engine, "staying")
    left = leave(engine, ids, params, after, str(tmp_path / "state"))
    arrived = go_on(engine, left, len(ids), params, staged=True)
    assert [*left.answer.tokens, *arrived.tokens] == staying.tokens
    assert arrived.proof == staying.proof
    engine.flush()


def test_a_resumed_cache_keeps_its_bytes(engine: Engine) -> None:
    # All entries stay, so those of the first turn are the first ones of each head.
    ids, params = prompt(600, seed=8), asking(engine, budget_tokens=2000)
    (first,) = engine.run([ids], params)
    assert first.kept is not None
    kept = first.kept.sum(dim=-1)
    turn = [*ids, *first.tokens, *prompt(50, seed=9)]
    before = _entries(engine, kept)
    (second,) = engine.run([turn], params)
    assert second.proof is not None
    # All but the last token, which was never cached.
    assert second.proof["session"]["resumed_tokens"] == len(ids) + len(first.tokens) - 1
    after = _entries(engine, kept)
    assert all(map(torch.equal, before, after))


def _entries(engine: Engine, lens: Tensor) -> list[Tensor]:
    """Return the bytes of the first entries [L, H] of each head of the newest held cache."""
    state = engine.runner.adakv.state
    tables = state.tables.tables(state.held.rows[-1])
    return [
        pool[tables[layer, head].long()].flatten(0, 1)[: lens[layer, head]]
        for pool in (state._cache.keys, state._cache.values)
        for layer, head in torch.cartesian_prod(*map(torch.arange, lens.shape)).tolist()
    ]
