"""No request ends an engine, leaves anything behind in it, or gets an error other than 400."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm.sampling_params import SamplingParams, StructuredOutputsParams

from adakv_worker.config import CompressionConfig
from adakv_worker.frontend.validator import RequestOptionsValidator, bound_by
from adakv_worker.messages import MemoryStats
from adakv_worker.statistics_carrier import figures_of
from tests.adakv_worker.async_engines import Side
from tests.adakv_worker.engines import Engine, assert_equals_reference, prompt
from tests.adakv_worker.hostile import Outcome, any_number, each_pair, send, start
from tests.adakv_worker.tiny_models import MODELS, add_tokenizer, gqa

SERVED = ("gqa", "mqa", "opt", "lora", "w4a16")
BOUNDS = CompressionConfig(min_budget_tokens=8, max_budget_tokens=400, max_window_tokens=64)
SEED = 3
_sent: dict[str, Outcome] = {}


@pytest.fixture(scope="module", autouse=True)
def print_outcomes() -> Iterator[None]:
    yield
    total = sum(outcome.sent for outcome in _sent.values())
    print(f"\n{total} requests were sent:", *(f"{k}: {v}" for k, v in _sent.items()), sep="\n  ")


@pytest.mark.parametrize("name", SERVED)
def test_an_engine_outlives_every_bad_value(
    in_process: None, tmp_path: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    model = MODELS[name](tmp_path)
    add_tokenizer(model.path)
    engine = start(model)
    # All pairs are sent, each to one of the engines.
    mine = each_pair(SEED)[SERVED.index(name) :: len(SERVED)]
    if name == "lora":
        # Stock vLLM raises in its kernels for CPUs, and the engine ends.
        mine = [one for one in mine if "prompt_logprobs" not in one.beside]
    bound_by(BOUNDS)
    checked = send(engine, mine, checked=True)
    unchecked = send(engine, mine, checked=False)
    bound_by(None)
    assert checked.refused > checked.finished
    assert unchecked.refused == 0
    record_property("requests", checked.sent + unchecked.sent)
    _sent[f"{name}, checked"], _sent[f"{name}, unchecked"] = checked, unchecked
    _check_idle(engine)
    results = engine.run([prompt(300, seed=9)], engine.params(max_tokens=30))
    assert results[0].proof is not None
    assert results[0].proof["skipped"] is None
    assert_equals_reference(results[0], model.reference, model.tolerance)
    engine.assert_nothing_leaked()
    engine.close()


def test_an_engine_outlives_options_at_random(in_process: None, tmp_path: Path) -> None:
    model = gqa(tmp_path)
    add_tokenizer(model.path)
    engine = start(model)
    requests = any_number(SEED)
    some = [next(requests) for _ in range(300)]
    _sent["at random, unchecked"] = send(engine, some, checked=False)
    _check_idle(engine)
    (output,) = engine.llm.beam_search(
        [{"prompt_token_ids": prompt(300)}], _beam_params(width=3, tokens=10)
    )
    assert len(output.sequences) == 3
    _check_idle(engine)
    engine.close()


def _beam_params(width: int, tokens: int) -> Any:
    from vllm.sampling_params import BeamSearchParams

    return BeamSearchParams(beam_width=width, max_tokens=tokens, ignore_eos=True)


def _check_idle(engine: Engine) -> None:
    engine.flush()
    engine.assert_nothing_leaked()
    figures = figures_of(engine.scheduler.make_stats())
    assert figures is not None
    assert figures.memory._replace(evictable_blocks=0, recomputed_tokens=0) == MemoryStats()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"stop_token_ids": [2**64]}, "stop_token_ids"),
        (
            {"structured_outputs": StructuredOutputsParams(json={"maximum": 10**30})},
            "structured_outputs",
        ),
    ],
)
def test_numbers_that_cannot_be_sent_to_an_engine_are_refused(
    options: dict[str, Any], field: str
) -> None:
    with pytest.raises(ValueError, match=f"^{field} has a whole number of more than 64 bits"):
        RequestOptionsValidator.validate_params(SamplingParams(**options))


async def test_requests_that_go_on_with_more_input_stay_whole(
    gqa_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    answers = []
    for compressing in (True, False):
        side = Side(gqa_model, compressing=compressing, async_scheduling=False)
        try:
            answers.append(await _two_turns(side))
        finally:
            side.llm.shutdown()
    (tokens, proofs), (expected, _) = answers
    assert tokens == expected
    assert {proof["skipped"] for proof in proofs} == {"resumable"}


async def _two_turns(side: Side) -> tuple[list[int], list[dict[str, Any]]]:
    from vllm.engine.protocol import StreamingInput
    from vllm.sampling_params import RequestOutputKind

    params = SamplingParams(
        temperature=0.0, max_tokens=20, ignore_eos=True, detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )  # fmt: skip
    answered = asyncio.Event()

    async def turns() -> AsyncGenerator[StreamingInput, None]:
        yield StreamingInput({"prompt_token_ids": prompt(400)}, params)
        await answered.wait()
        yield StreamingInput({"prompt_token_ids": prompt(300, seed=1)}, params)

    tokens: list[int] = []
    proofs = []
    async for output in side.llm.generate(turns(), params, "turns"):
        tokens += output.outputs[0].token_ids
        proofs += [(output.kv_transfer_params or {}).get("kv_compression")]
        if len(tokens) >= 20:
            answered.set()
    return tokens, [proof for proof in proofs if proof is not None]
