"""Engines on a CUDA GPU whose caches, or compressed pages, store fewer bits.

`pytest -n 8 --dist loadgroup tests/adakv_worker/test_bits_on_gpu.py` starts all of them at once.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.adakv_worker.eight_bits import Paged, as_stored, assert_near_reference, attention_to
from tests.adakv_worker.engine.test_eviction import BOUND, Traced, run
from tests.adakv_worker.engines import Engine, Reference, make_tiny_model, prompt
from tests.adakv_worker.test_on_gpu import Kind, engines

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

_CACHES = ["fp8", "int8_per_token_head", "fp8_per_token_head", "int4_per_token_head"]
_PAGES = [("FLASH_ATTN", form) for form in ("fp8", "int8", "int4")] + [("TRITON_ATTN", "int8")]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_model(folder, heads=8, kv_heads=2, head_dim=64, initializer_range=0.06)


@pytest.fixture(
    scope="module",
    params=[pytest.param(form, marks=pytest.mark.xdist_group(form)) for form in _CACHES],
)
def cache(
    request: pytest.FixtureRequest,
    in_process: None,
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Engine, Reference]]:
    options = {"attention_backend": "TRITON_ATTN", "kv_cache_dtype": request.param}
    kind = Kind(request.param, True, options)
    reference = _as_the_engine(Reference(model, attention_to(request.param, as_stored)))
    for engine in engines(kind, model, tmp_path_factory.mktemp("compiled")):
        yield engine, reference


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((backend, form), id=name, marks=pytest.mark.xdist_group(name))
        for backend, form in _PAGES
        for name in [f"{backend}-{form}"]
    ],
)
def pages(
    request: pytest.FixtureRequest,
    in_process: None,
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Engine, Paged]]:
    backend, form = request.param
    kind = Kind(f"{backend}-{form}", True, {"attention_backend": backend})
    store = functools.partial(as_stored, form=form)
    paged = Paged(model, form, store, store)
    _as_the_engine(paged.reference)
    folder = tmp_path_factory.mktemp("compiled")
    for engine in engines(kind, model, folder, page_dtype=form):
        yield engine, paged


def _as_the_engine(reference: Reference) -> Reference:
    with torch.no_grad():
        for weights in reference.model.parameters():
            weights.copy_(weights.half())
    return reference


def test_quantized_caches_are_compressed(cache: tuple[Engine, Reference]) -> None:
    engine, reference = cache
    prompts = [prompt(700, seed=1), prompt(300, seed=2), prompt(20, seed=3), prompt(700, seed=1)]
    results = engine.run(prompts, engine.params(max_tokens=30))
    assert [result.kept is None for result in results] == [False, False, True, False]
    for result in results:
        assert_near_reference(result, reference)
    # The control: these answers tell which entries were kept.
    with pytest.raises(AssertionError):
        assert_near_reference(results[0]._replace(kept=None), reference)


def test_quantized_caches_are_evicted_from(cache: tuple[Engine, Reference]) -> None:
    engine, reference = cache
    traced = Traced(engine, "one", prompt(300, seed=4), engine.params(100, extra_args=BOUND))
    run(engine, {"one": traced})
    assert traced.result is not None
    assert_near_reference(traced.result, reference, traced.kept_at)


def test_compressed_prompts_lie_in_pages_of_fewer_bits(pages: tuple[Engine, Paged]) -> None:
    engine, paged = pages
    prompts = [prompt(700, seed=1), prompt(300, seed=2), prompt(700, seed=1)]
    for result in engine.run(prompts, engine.params(max_tokens=30)):
        assert result.proof is not None
        assert result.proof["page_tokens"] > 16
        paged.assert_near(result)


def test_such_pages_are_evicted_from(pages: tuple[Engine, Paged]) -> None:
    engine, paged = pages
    traced = Traced(engine, "one", prompt(300, seed=4), engine.params(100, extra_args=BOUND))
    run(engine, {"one": traced})
    assert traced.result is not None
    paged.assert_near(traced.result, traced.kept_at)
