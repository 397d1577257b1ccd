"""Proofs in an engine's outputs, which carry one only when it has changed."""

from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

from adakv_serve.serving.http.answer_proofs import AnswerProofs, answering
from adakv_serve.serving.vllm_engine.proofs import take_proofs
from adakv_worker.messages import with_proof
from tests.adakv_worker.proofs import make_proof


class FakeEngine:
    """The part of `AsyncLLM` that proofs pass; `answers` holds what its front end gets."""

    def __init__(self) -> None:
        self.output_processor: Any = self
        self.request_states: dict[str, Any] = {}
        self.answers: list[Any] = []

    async def generate(self, prompt: Any, params: Any, request_id: str) -> AsyncIterator[None]:
        for index in range(params.n):
            name = f"{index}_{request_id}-internal"
            self.output_processor.add_request(SimpleNamespace(request_id=name), index, request_id)
        yield None

    def add_request(self, request: Any, index: int, request_id: str) -> None:
        self.request_states[request.request_id] = SimpleNamespace(
            external_req_id=request_id, request_index=index
        )

    def process_outputs(self, outputs: list[Any]) -> None:
        self.answers += [output.kv_transfer_params for output in outputs]

    def step(self, name: str, params: dict[str, Any] | None) -> None:
        output: Any = SimpleNamespace(request_id=f"{name}-internal", kv_transfer_params=params)
        self.output_processor.process_outputs([output])


def proof(evictions: int) -> dict[str, Any]:
    return with_proof(make_proof(decode_evictions=evictions))


async def start(engine: Any, *requests: tuple[str, int]) -> None:
    streams = [engine.generate([], SimpleNamespace(n=n), name) for name, n in requests]
    # As `merge_async_iterators`, which starts them in any order.
    for stream in reversed(streams):
        await anext(stream)


def evictions(proofs: AnswerProofs, choices: int) -> list[int | None]:
    return [(proofs.of_choice(i) or {}).get("decode_evictions") for i in range(choices)]


async def test_each_choice_of_each_prompt_has_its_own_proof() -> None:
    engine = FakeEngine()
    take_proofs(engine)  # type: ignore[arg-type]
    with answering() as proofs:
        await start(engine, ("one", 2), ("two", 2))
    for number, name in enumerate(("0_one", "1_one", "0_two", "1_two")):
        engine.step(name, proof(number))
    assert evictions(proofs, 4) == [0, 1, 2, 3]


async def test_the_last_proof_stays_if_later_outputs_have_none() -> None:
    engine = FakeEngine()
    take_proofs(engine)  # type: ignore[arg-type]
    with answering() as proofs:
        await start(engine, ("one", 1))
    for params in (None, proof(0), None, proof(1), None):
        engine.step("0_one", params)
    assert evictions(proofs, 1) == [1]


async def test_answers_at_the_same_time_do_not_mix() -> None:
    engine = FakeEngine()
    take_proofs(engine)  # type: ignore[arg-type]
    with answering() as first:
        await start(engine, ("one", 1))
    with answering() as second:
        await start(engine, ("two", 1))
    engine.step("0_two", proof(2))
    engine.step("0_one", proof(1))
    assert (evictions(first, 2), evictions(second, 2)) == ([1, None], [2, None])


async def test_vllm_hands_on_the_same_as_without_compression() -> None:
    engine = FakeEngine()
    take_proofs(engine)  # type: ignore[arg-type]
    with answering():
        await start(engine, ("one", 1))
    kept = proof(0)
    for params in (kept, {**kept, "remote": 1}, {"remote": 2}, None):
        engine.step("0_one", params)
    assert engine.answers == [None, {"remote": 1}, {"remote": 2}, None]
    assert kept == proof(0)


async def test_requests_outside_an_answer_leave_it_alone() -> None:
    engine = FakeEngine()
    take_proofs(engine)  # type: ignore[arg-type]
    await start(engine, ("one", 1))
    engine.step("0_one", proof(1))
    engine.step("gone", proof(1))
    assert engine.answers == [None, None]
