"""An error of a policy: its request finishes, and other requests answer as before."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from adakv_serve.kernels.policies.presets import PRESETS
from adakv_worker.statistics_carrier import figures_of
from tests.adakv_worker.engine.test_eviction import BOUND, Traced, run
from tests.adakv_worker.engines import (
    Engine,
    Reference,
    Result,
    assert_equals_reference,
    prompt,
)
from tests.adakv_worker.faulty_policies import Fault
from tests.adakv_worker.tiny_models import gqa

KEEP = 48
SINKS = 4
LAST_LAYER = 2


class Counted:
    """Count of failed selections in the scheduler's statistics."""

    def __init__(self, engine: Engine) -> None:
        self.failures = 0
        self._make_stats = engine.scheduler.make_stats
        engine.scheduler.make_stats = self._counted

    def _counted(self, *args: Any, **kwargs: Any) -> Any:
        stats = self._make_stats(*args, **kwargs)
        figures = figures_of(stats)
        assert figures is not None
        self.failures += figures.memory.selection_failures
        return stats


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gqa(tmp_path_factory.mktemp("gqa")).path


@pytest.fixture(scope="module")
def engine(in_process: None, model: Path) -> Iterator[Engine]:
    engine = _engine(model)
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


@pytest.fixture
def counted(engine: Engine) -> Iterator[Counted]:
    counted = Counted(engine)
    yield counted
    engine.scheduler.make_stats = counted._make_stats
    engine.assert_nothing_leaked()


@pytest.fixture
def preset(monkeypatch: pytest.MonkeyPatch) -> Callable[[Fault], str]:
    """Register a policy with a fault under a name of its own."""

    def register(fault: Fault) -> str:
        name = f"faulty-{next(_numbers)}"
        monkeypatch.setitem(PRESETS, name, fault.policy)
        return name

    return register


# Each fault needs a new name: policies are cached by name.
_numbers = itertools.count()


def _engine(model: Path) -> Engine:
    return Engine(
        model,
        {"policy": "ada_snapkv", "budget_tokens": KEEP, "keep_ratio": 0.0, "window_tokens": 16},
        disable_log_stats=False,
    )


def _check_kept_recent(result: Result, preset: str, reference: Reference) -> None:
    assert result.proof is not None
    assert result.proof["fallback"].startswith(f"policy '{preset}' failed")
    assert (result.proof["kept_mean"], result.proof["skipped"]) == (KEEP, None)
    assert (result.proof["kept_min"], result.proof["kept_max"]) == (KEEP, KEEP)
    assert result.finish_reason == "length"
    recent = torch.zeros(len(result.prompt), dtype=torch.bool)
    recent[:SINKS] = True
    recent[SINKS - KEEP :] = True
    assert result.kept is not None
    assert torch.equal(result.kept, recent.expand_as(result.kept))
    assert_equals_reference(result, reference, 1e-3)


def _out_of_memory() -> Exception:
    return torch.OutOfMemoryError("made for a test")


COMPRESSING = {
    "scores of the first layer": Fault("score"),
    "scores of the last layer": Fault("score", layer=LAST_LAYER),
    "no memory for scores": Fault("score", _out_of_memory, layer=1),
    "queries that are missing": Fault("score", lambda: LookupError("no queries")),
    "a failed assertion": Fault("score", AssertionError),
    "totals before any scores": Fault("totals"),
    "totals of all scores": Fault("totals", needs_scores=True),
    "no memory for totals": Fault("totals", _out_of_memory, needs_scores=True),
    "allocation": Fault("allocate"),
    "no memory for allocation": Fault("allocate", _out_of_memory, needs_scores=True),
}


@pytest.mark.parametrize("case", COMPRESSING)
def test_an_error_while_compressing_stays_with_its_request(
    engine: Engine,
    reference: Reference,
    counted: Counted,
    preset: Callable[[Fault], str],
    case: str,
) -> None:
    name = preset(COMPRESSING[case])
    _compress_beside_others(engine, reference, name)
    assert counted.failures == 1


@pytest.mark.parametrize("layers_copied", [1, 2])
def test_an_error_after_some_layers_were_copied(
    engine: Engine,
    reference: Reference,
    counted: Counted,
    preset: Callable[[Fault], str],
    monkeypatch: pytest.MonkeyPatch,
    layers_copied: int,
) -> None:
    # As with a prompt so long that a compression holds the scores of one layer only.
    monkeypatch.setattr(engine.runner.adakv.state, "held_bytes", 1)
    name = preset(Fault("allocate", spared=layers_copied))
    _compress_beside_others(engine, reference, name)
    assert counted.failures == 1


def _compress_beside_others(engine: Engine, reference: Reference, name: str) -> None:
    others = [prompt(400, seed=1), prompt(30, seed=2), prompt(500, seed=3)]
    alone = engine.run(others)
    faulty = engine.params(extra_args={"adakv_policy": name, "adakv_budget_tokens": KEEP})
    # The same prompt with and without the fault, so that they have blocks in common.
    failed, *beside = engine.run([prompt(450), *others], [faulty, *[engine.params()] * 3])
    _check_kept_recent(failed, name, reference)
    for mine, before in zip(beside, alone, strict=True):
        assert mine.tokens == before.tokens
        assert mine.proof is not None
        assert mine.proof["fallback"] is None


def test_all_requests_of_a_step_may_fail(
    engine: Engine, reference: Reference, counted: Counted, preset: Callable[[Fault], str]
) -> None:
    name = preset(Fault("score", layer=LAST_LAYER))
    faulty = engine.params(extra_args={"adakv_policy": name, "adakv_budget_tokens": KEEP})
    for result in engine.run([prompt(200, seed=seed) for seed in range(8)], faulty):
        _check_kept_recent(result, name, reference)
    assert counted.failures == 8


def test_a_window_whose_beginning_is_lost(
    engine: Engine, reference: Reference, counted: Counted
) -> None:
    # A step takes 512 tokens: the window lies on both sides of the border.
    core = engine.llm.llm_engine
    traced = Traced(engine, "lost", prompt(520, seed=8), engine.params())
    (request,) = engine.scheduler.requests
    core.step()
    assert engine.runner.adakv.state.windows.get(request) is not None
    # As without memory for it.
    engine.runner.adakv.state.windows.drop([request])
    run(engine, {"lost": traced})
    assert traced.result is not None
    result = traced.result._replace(kept=traced.kept_at[-1])
    _check_kept_recent(result, "ada_snapkv", reference)
    assert counted.failures == 1


EVICTING = {
    "scores of the first layer": Fault("score", evicting=True),
    "scores of the last layer": Fault("score", evicting=True, layer=LAST_LAYER),
    "no memory for scores": Fault("score", _out_of_memory, evicting=True),
    "scores of all layers at once": Fault("score", evicting=True, ragged=True),
    # The first call is the compression's.
    "totals": Fault("totals", spared=1),
    "allocation": Fault("allocate", spared=1),
    "no memory for allocation": Fault("allocate", _out_of_memory, spared=1),
}


@pytest.mark.parametrize("case", EVICTING)
def test_an_error_while_evicting_stays_with_its_request(
    engine: Engine,
    reference: Reference,
    counted: Counted,
    preset: Callable[[Fault], str],
    case: str,
) -> None:
    name = preset(EVICTING[case])
    bounded = engine.params(max_tokens=100, extra_args=BOUND)
    others = {"bounded": (prompt(300, seed=1), bounded), "plain": (prompt(400, seed=2), None)}
    alone = _trace(engine, others)
    options = {**BOUND, "adakv_policy": name, "adakv_budget_tokens": KEEP}
    faulty = (prompt(300), engine.params(max_tokens=100, extra_args=options))
    together = _trace(engine, {"faulty": faulty, **others})
    failed = together["faulty"].result
    assert failed is not None
    assert failed.proof is not None
    assert failed.proof["fallback"].startswith(f"policy '{name}' failed")
    assert failed.proof["kept_mean"] == KEEP
    assert failed.proof["decode_evictions"] == counted.failures == 99 // 32
    last = together["faulty"].kept_at[-1]
    assert last is not None
    assert bool((last.sum(dim=(1, 2)) == KEEP * last.shape[1]).all())
    assert bool(last[..., :SINKS].all())
    assert_equals_reference(failed, reference, 1e-3, together["faulty"].kept_at)
    for other, traced in alone.items():
        mine, before = together[other].result, traced.result
        assert mine is not None
        assert before is not None
        assert mine.tokens == before.tokens


def _trace(engine: Engine, requests: dict[str, tuple[list[int], Any]]) -> dict[str, Traced]:
    traced = {
        name: Traced(engine, name, ids, params or engine.params())
        for name, (ids, params) in requests.items()
    }
    run(engine, traced)
    return traced
