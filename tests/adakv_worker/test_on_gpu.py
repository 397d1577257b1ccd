"""Engines on a CUDA GPU answer as a reference that attends to the kept entries.

Run every kind of engine in a process of its own, where vLLM for CUDA is installed:
`pytest -n 9 --dist loadgroup tests/adakv_worker/test_on_gpu.py`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from adakv_worker.worker.runner_v1 import AdaKVRunnerV1
from adakv_worker.worker.runner_v2 import AdaKVRunnerV2
from tests.adakv_worker.engine.test_eviction import BOUND, Traced, run
from tests.adakv_worker.engines import (
    Engine,
    Reference,
    assert_equals_reference,
    make_tiny_model,
    prompt,
)

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

# In float16 this model's log-probabilities are off by about 0.003; those of an answer that attends
# to other entries, by about 2.
_TOLERANCE = 0.03


class Kind(NamedTuple):
    """An engine: options of vLLM, and whether Model Runner V2 runs it."""

    name: str
    use_v2: bool
    options: dict[str, Any]


_NO_GRAPHS = {"enforce_eager": True}
_GRAPHS_ONLY = {"compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}}
_TRITON = {"attention_backend": "TRITON_ATTN"}
_SYNCHRONOUS = {
    "async_scheduling": False, "scheduler_cls": "adakv_worker.scheduler.AdaKVScheduler",
}  # fmt: skip
_KINDS = [
    # What vLLM takes on CUDA: compiled, full and piecewise graphs, asynchronous scheduling.
    Kind("V2", True, {}),
    Kind("V2-graphs-only", True, _GRAPHS_ONLY),
    Kind("V2-eager", True, _NO_GRAPHS),
    Kind("V2-synchronous", True, _SYNCHRONOUS),
    Kind("V1", False, {}),
    Kind("V1-eager", False, _NO_GRAPHS),
    Kind("V2-Triton", True, _TRITON),
    Kind("V2-Triton-eager", True, _TRITON | _NO_GRAPHS),
    Kind("V1-Triton", False, _TRITON),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    return make_tiny_model(folder, heads=8, kv_heads=2, head_dim=64, initializer_range=0.06)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    reference = Reference(model)
    # The engine's weights.
    reference.model.half().float()
    return reference


# `--dist loadgroup` of pytest-xdist runs one kind of engine per process.
_PARAMS = [
    pytest.param(kind, id=kind.name, marks=pytest.mark.xdist_group(kind.name)) for kind in _KINDS
]


@pytest.fixture(scope="module", params=_PARAMS)
def engine(request: pytest.FixtureRequest, in_process: None, model: Path) -> Iterator[Engine]:
    kind: Kind = request.param
    compression = {"budget_tokens": 48, "keep_ratio": 0.0, "window_tokens": 8}
    settings = {
        "dtype": "float16", "block_size": 16, "enforce_eager": False,
        "max_num_batched_tokens": 256, "gpu_memory_utilization": 0.05, **kind.options,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(kind.use_v2)))
        engine = Engine(model, compression, **settings)
        yield engine
        engine.flush()
        engine.assert_nothing_leaked()
        engine.close()


def test_the_engine_is_of_that_kind(engine: Engine, request: pytest.FixtureRequest) -> None:
    kind: Kind = request.node.callspec.params["engine"]
    backend = engine.runner.attn_groups[0][0].backend.__name__
    assert backend == ("AdaKVTritonBackend" if "Triton" in kind.name else "AdaKVFlashBackend")
    assert isinstance(engine.runner, AdaKVRunnerV2 if kind.use_v2 else AdaKVRunnerV1)
    assert type(engine.runner.adakv.state.tables).__name__ == "DeviceTables"


def test_compressed_and_whole_caches_in_one_batch(engine: Engine, reference: Reference) -> None:
    # Prefills of several chunks, a prefix that is found, one that keeps everything.
    prompts = [prompt(700, seed=1), prompt(300, seed=2), prompt(20, seed=3), prompt(700, seed=1)]
    params = [engine.params(max_tokens=tokens) for tokens in (40, 30, 24, 40)]
    results = engine.run(prompts, params)
    assert [result.kept is None for result in results] == [False, False, True, False]
    for result in results:
        assert_equals_reference(result, reference, _TOLERANCE)
    # The control: these answers tell which entries were kept.
    with pytest.raises(AssertionError):
        assert_equals_reference(results[0]._replace(kept=None), reference, _TOLERANCE)


@pytest.mark.parametrize("policy", ["ada_snapkv", "kv_compress", "defensive", "expected_attention"])
def test_a_policy_answers_as_the_reference(
    engine: Engine, reference: Reference, policy: str
) -> None:
    params = engine.params(max_tokens=20, extra_args={"adakv_policy": policy})
    for result in engine.run([prompt(n, seed=n) for n in (200, 333, 900)], params):
        assert result.kept is not None
        assert result.proof is not None
        assert result.proof["kept_mean"] == 48
        assert_equals_reference(result, reference, _TOLERANCE)


def test_evicting_steps_attend_to_the_kept_entries(engine: Engine, reference: Reference) -> None:
    bounded = engine.params(max_tokens=100, extra_args=BOUND)
    requests = {
        f"{length}": Traced(engine, f"{length}", prompt(length, seed=length), params)
        for length, params in ((40, bounded), (300, bounded), (200, engine.params(max_tokens=60)))
    }
    run(engine, requests)
    for traced in requests.values():
        assert traced.result is not None
        assert_equals_reference(traced.result, reference, _TOLERANCE, traced.kept_at)


def test_a_full_batch_answers_as_the_reference(engine: Engine, reference: Reference) -> None:
    prompts = [prompt(100 + 40 * number, seed=50 + number) for number in range(16)]
    params = [engine.params(max_tokens=16 + number) for number in range(16)]
    for result in engine.run(prompts, params):
        assert result.kept is not None
        assert_equals_reference(result, reference, _TOLERANCE)
