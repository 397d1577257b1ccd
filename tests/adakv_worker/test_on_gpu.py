"""Engines on a CUDA GPU answer as a reference that attends to the kept entries.

Run every kind of engine in a process of its own, where vLLM for CUDA is installed:
`pytest -n 13 --dist loadgroup tests/adakv_worker/test_on_gpu.py`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from adakv_worker.worker.runner_v1 import AdaKVRunnerV1
from adakv_worker.worker.runner_v2 import AdaKVRunnerV2
from tests.adakv_worker.conversation import SESSIONS, Conversation
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
    with torch.no_grad():
        # The engine's weights. Buffers stay: the frequencies of RoPE are float32 in the engine.
        for weights in reference.model.parameters():
            weights.copy_(weights.half())
    return reference


# `--dist loadgroup` of pytest-xdist runs one kind of engine per process.
_PARAMS = [
    pytest.param(kind, id=kind.name, marks=pytest.mark.xdist_group(kind.name)) for kind in _KINDS
]
_TALKING = [
    pytest.param(kind, id=kind.name, marks=pytest.mark.xdist_group(f"{kind.name}-sessions"))
    for kind in _KINDS
    if kind.name in ("V2", "V2-eager", "V1", "V2-Triton")
]


def engines(
    kind: Kind,
    model: Path,
    folder: Path,
    sessions: dict[str, Any] | None = None,
    page_dtype: str = "auto",
) -> Iterator[Engine]:
    compression = {
        "budget_tokens": 48, "keep_ratio": 0.0, "window_tokens": 8, "sessions": sessions or {},
        "page_dtype": page_dtype,
    }  # fmt: skip
    settings = {
        "dtype": "float16", "block_size": 16, "enforce_eager": False,
        "max_num_batched_tokens": 256, "gpu_memory_utilization": 0.05, **kind.options,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(kind.use_v2)))
        # Engines that start at once would write compiled code to the same files.
        patch.setenv("VLLM_CACHE_ROOT", str(folder))
        engine = Engine(model, compression, **settings)
        yield engine
        engine.flush()
        engine.assert_nothing_leaked()
        engine.close()


@pytest.fixture(scope="module", params=_PARAMS)
def engine(
    request: pytest.FixtureRequest,
    in_process: None,
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    yield from engines(request.param, model, tmp_path_factory.mktemp("compiled"))


@pytest.fixture(scope="module", params=_TALKING)
def talking(
    request: pytest.FixtureRequest,
    in_process: None,
    model: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    folder = tmp_path_factory.mktemp("compiled")
    yield from engines(request.param, model, folder, {**SESSIONS, "host_bytes": 64 << 20})


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


def test_turns_go_on_from_the_held_cache(talking: Engine, reference: Reference) -> None:
    talks = [Conversation(talking, reference, _TOLERANCE) for _ in range(3)]
    params = talking.params(max_tokens=12)
    results = talking.run([prompt(n, seed=70 + n) for n in (300, 150, 700)], params)
    for talk, result in zip(talks, results, strict=True):
        talk.note(result)
    # Turns that fit one chunk, that take several, and of one token, beside prompts from the start.
    for new in ((90, 5, 400), (1, 300, 33)):
        asked = [
            [*result.prompt, *result.tokens, *prompt(count, seed=80 + count)]
            for result, count in zip(results, new, strict=True)
        ]
        fresh = prompt(200, seed=90 + new[0])
        every = talking.run([*asked, fresh], params)
        before, results = results, every[:3]
        assert_equals_reference(every[3], reference, _TOLERANCE)
        for talk, last, result in zip(talks, before, results, strict=True):
            talk.note(result)
            # All but the last token of the answer, which was never an input.
            assert talk.resumed == len(last.prompt) + 11


def test_an_answer_is_asked_for_again(talking: Engine, reference: Reference) -> None:
    talk = Conversation(talking, reference, _TOLERANCE)
    first = talk.turn(prompt(300, seed=75))
    talk.turn(first.prompt)
    assert talk.resumed == 299


def test_branches_of_one_conversation_get_copies(talking: Engine, reference: Reference) -> None:
    talks = [Conversation(talking, reference, _TOLERANCE) for _ in range(3)]
    first = talks[0].turn(prompt(300, seed=76))
    for talk in talks[1:]:
        talk.tokens, talk.seen, talk._kept = talks[0].tokens, talks[0].seen, talks[0]._kept
    asked = [[*first.prompt, *first.tokens, *prompt(60, seed=77 + n)] for n in range(3)]
    for talk, result in zip(talks, talking.run(asked, talking.params()), strict=True):
        talk.note(result)
        assert talk.resumed == 311
