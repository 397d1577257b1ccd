"""Real engines on the GPU's path answer as a reference that attends to the kept entries."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from vllm.v1.attention import selector

from adakv_worker.core.answer_lengths import AnswerLengths
from tests.adakv_worker.conversation import SESSIONS, Conversation
from tests.adakv_worker.engine.test_eviction import Traced, run
from tests.adakv_worker.engines import (
    Engine,
    Reference,
    Result,
    assert_equals_reference,
    make_tiny_model,
    prompt,
)
from tests.adakv_worker.gpu import interpreted
from tests.adakv_worker.gpu.graphs import Graphs


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), heads=4, kv_heads=2, layers=2)


@pytest.fixture(scope="module")
def reference(model: Path) -> Reference:
    return Reference(model)


# Triton's attention is slow in its interpreter: only tests of attention use it.
class Kind(NamedTuple):
    backend: str
    use_v2: bool
    graphs: bool = False
    asynchronous: bool = False

    def __str__(self) -> str:
        extras = ["graphs"] * self.graphs + ["asynchronous"] * self.asynchronous
        return "-".join([self.backend, "V2" if self.use_v2 else "V1", *extras])


_FAST = [
    Kind("Flash", use_v2=False),
    Kind("Flash", use_v2=False, graphs=True),
    Kind("Flash", use_v2=True),
    Kind("Flash", use_v2=True, graphs=True, asynchronous=True),
]


_TRITON = Kind("Triton", use_v2=True, graphs=True)
# What `make test` starts; the others are slow.
_QUICK = {_TRITON, _FAST[-1]}


def on(*kinds: Kind) -> pytest.MarkDecorator:
    cases = [
        pytest.param(kind, marks=() if kind in _QUICK else pytest.mark.slow, id=str(kind))
        for kind in kinds
    ]
    return pytest.mark.parametrize("engine", cases, indirect=True, scope="module")


@contextmanager
def started(
    model: Path,
    kind: Kind,
    sessions: dict[str, Any] | None = None,
    decode_budget_tokens: int | None = None,
    page_dtype: str = "auto",
    **options: Any,
) -> Iterator[Engine]:
    from adakv_worker.attention import cpu as cpu_backend
    from adakv_worker.attention import gpu as gpu_backends

    compression = {
        "budget_tokens": 40, "keep_ratio": 0.0, "window_tokens": 8, "sessions": sessions or {},
        "decode_budget_tokens": decode_budget_tokens, "page_dtype": page_dtype,
    }  # fmt: skip
    settings = {
        "block_size": 16, "max_model_len": 512, "max_num_batched_tokens": 64,
        "kv_cache_memory_bytes": 8 << 20, **options,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        backend = getattr(gpu_backends, f"AdaKV{kind.backend}Backend")
        patch.setattr(cpu_backend, "AdaKVCPUBackend", backend)
        # It holds the backend of the last engine.
        selector._cached_get_attn_backend.cache_clear()
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(kind.use_v2)))
        patch.setattr(interpreted, "graphs", Graphs(patch) if kind.graphs else None)
        if kind.asynchronous:
            settings["scheduler_cls"] = "adakv_worker.scheduler.AdaKVAsyncScheduler"
        engine = Engine(model, compression, **settings)
        assert engine.runner.attn_groups[0][0].backend is backend
        yield engine
        engine.assert_nothing_leaked()
        engine.close()


@pytest.fixture(scope="module")
def engine(request: pytest.FixtureRequest, model: Path) -> Iterator[Engine]:
    with started(model, request.param) as engine:
        yield engine


@on(_TRITON, *_FAST)
def test_pages_lie_as_on_the_gpu(engine: Engine) -> None:
    # A block of two layers, two heads, 16 entries of keys and values of 32 numbers.
    assert engine.runner.kv_caches[0].stride() == (2 * 2 * 16 * 64, 16 * 64, 64, 1)
    assert type(engine.runner.adakv.state.tables).__name__ == "DeviceTables"


@on(_TRITON, *_FAST)
def test_compressed_and_whole_caches_in_one_batch(engine: Engine, reference: Reference) -> None:
    for result in compressed_and_whole(engine):
        assert_equals_reference(result, reference, 1e-3)


def compressed_and_whole(engine: Engine, lengths: Sequence[int] = (90, 120, 20)) -> list[Result]:
    """Run prompts of several chunks, one that stays whole, and one whose prefix is found."""
    prompts = [prompt(length, seed=seed) for seed, length in enumerate(lengths, start=1)]
    results = engine.run([*prompts, prompts[0]], engine.params(max_tokens=10))
    first, _, whole, again = (result.kept for result in results)
    assert whole is None
    assert first is not None
    assert again is not None
    assert torch.equal(first, again)
    return results


@on(*(kind for kind in _FAST if kind.graphs))
def test_graphs_are_of_compressed_and_whole_caches(engine: Engine, reference: Reference) -> None:
    replayed = interpreted.graphs.replayed
    replayed.clear()
    prompts = [prompt(90, seed=11), prompt(120, seed=12), prompt(30, seed=13)]
    params = [engine.params(max_tokens=tokens) for tokens in (12, 9, 14)]
    results = engine.run(prompts, params)
    assert [result.kept is None for result in results] == [False, False, True]
    for result in results:
        assert_equals_reference(result, reference, 1e-3)
    # Three decode in a graph of four; then two, then one.
    assert set(replayed) == {4, 2, 1}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in _FAST if kind.asynchronous], ids=str)
def test_preempted_requests_come_back_right(model: Path, reference: Reference, kind: Kind) -> None:
    # 30 blocks of 16 KiB: four of these prompts compressed and grown do not fit together.
    with started(model, kind, kv_cache_memory_bytes=30 << 14, max_model_len=256) as engine:
        # Admission expects short answers.
        engine.manager.admission.answer_lengths = AnswerLengths(prior_tokens=2)
        prompts = [prompt(90, seed=30 + number) for number in range(4)]
        results = engine.run(prompts, engine.params(max_tokens=90, ignore_eos=False))
        assert engine.preemptions > 0
    assert [len(result.tokens) for result in results] == [90] * 4
    tokens = [result.proof["original_tokens"] for result in results if result.proof]
    # A compression after a preemption included the answer so far.
    assert min(tokens) == 90 < max(tokens)
    for result, original in zip(results, tokens, strict=True):
        if original == 90:
            assert_equals_reference(result, reference, 1e-3)


@on(*_FAST)
@pytest.mark.parametrize("policy", ["critical_kv_compress", "defensive", "expected_attention"])
def test_policies(engine: Engine, reference: Reference, policy: str) -> None:
    params = engine.params(max_tokens=3, extra_args={"adakv_policy": policy})
    (result,) = engine.run([prompt(70, seed=4)], params)
    assert result.kept is not None
    assert_equals_reference(result, reference, 1e-3)


@on(*_FAST)
def test_evictions_while_answers_are_written(engine: Engine, reference: Reference) -> None:
    bound = {"adakv_decode_budget_tokens": 40, "adakv_decode_interval_tokens": 32}
    params = engine.params(max_tokens=36, extra_args=bound)
    traced = Traced(engine, "one", prompt(60, seed=5), params)
    run(engine, {"one": traced})
    result = traced.result
    assert result is not None
    assert result.proof is not None
    assert result.proof["decode_evictions"] == 1
    assert_equals_reference(result, reference, 1e-3, traced.kept_at)


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in _QUICK else pytest.mark.slow, id=str(kind))
        for kind in _FAST
        if kind.graphs
    ],
)
def test_graphs_run_the_steps_before_an_eviction_and_its_own(
    model: Path, reference: Reference, kind: Kind
) -> None:
    with started(model, kind, decode_budget_tokens=40) as engine:
        interpreted.graphs.replayed.clear()
        bound = {"adakv_decode_budget_tokens": 40, "adakv_decode_interval_tokens": 32}
        traced = {
            f"{length}": Traced(
                engine, f"{length}", prompt(length, seed=length),
                engine.params(max_tokens=tokens, extra_args=bound),
            )
            for length, tokens in ((60, 40), (90, 50))
        }  # fmt: skip
        run(engine, traced)
        replayed = list(interpreted.graphs.replayed)
    for one in traced.values():
        assert one.result is not None
        assert one.result.proof is not None
        assert one.result.proof["decode_evictions"] == 1
        assert_equals_reference(one.result, reference, 1e-3, one.kept_at)
    # All tokens but the first of each come from steps of decodes alone, or beside the other's
    # prompt.
    assert len(replayed) >= 48


@on(*_FAST)
def test_a_cache_leaves_and_comes_back(engine: Engine, reference: Reference) -> None:
    traced = Traced(engine, "moving", prompt(120, seed=7), engine.params(max_tokens=8))
    run_with_a_move(engine, traced)
    assert traced.result is not None
    assert_equals_reference(traced.result, reference, 1e-3, traced.kept_at)


def run_with_a_move(engine: Engine, traced: Traced) -> None:
    """Run a request whose cache leaves its pages in between, is overwritten, and comes back."""
    core, state = engine.llm.llm_engine, engine.runner.adakv.state
    nothing = float("nan") if state.dtype.is_floating_point else torch.iinfo(state.dtype).max
    moved = False
    while core.has_unfinished_requests():
        kept = traced.before_step()
        (request_id,) = state._rows or [""]
        if kept is not None and not moved:
            row = state._rows[request_id]
            exported, slabs = state.export(request_id), list(state.tables._slabs[row])
            state._cache.keys[state.tables.filled_pages(row)] = nothing
            selections = state.selections[request_id]
            state.restore(request_id, exported, slabs)
            state.selections[request_id] = selections
            moved = True
        for output in core.step():
            traced.note(output, kept)
    engine.flush()
    assert moved


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=() if kind in _QUICK else pytest.mark.slow, id=str(kind))
        for kind in (_TRITON, *_FAST)
    ],
)
def test_turns_go_on_from_held_caches(model: Path, reference: Reference, kind: Kind) -> None:
    with started(model, kind, SESSIONS) as engine:
        lengths = (90, 120)
        talks = [Conversation(engine, reference) for _ in lengths]
        params = engine.params(max_tokens=6)
        results = engine.run([prompt(n, seed=n) for n in lengths], params)
        # A new turn in chunks beside one of one token; then two that fit one step.
        for turn, new in enumerate(((70, 1), (9, 30))):
            for talk, result in zip(talks, results, strict=True):
                talk.note(result)
            asked = [
                [*result.prompt, *result.tokens, *prompt(count, seed=200 + turn)]
                for result, count in zip(results, new, strict=True)
            ]
            *results, _ = engine.run([*asked, prompt(50, seed=300 + turn)], params)
        for talk, result in zip(talks, results, strict=True):
            talk.note(result)
            assert talk.proof["session"]["turn"] == 3
