"""A compressed request that moves while it decodes answers as if it had stayed."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from vllm.exceptions import VLLMValidationError

from adakv_worker.messages import Continuation, Proof, proof_in
from adakv_worker.worker.packed_state import StateHeader
from tests.adakv_worker.engines import Engine, prompt

WAYS_TO_SAMPLE: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "top_p": 0.95, "seed": 11},
    "penalties": {
        "temperature": 0.8, "seed": 3, "presence_penalty": 0.7, "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
    },
    "greedy penalties": {"frequency_penalty": 1.5},
    "least tokens": {"min_tokens": 25, "stop_token_ids": list(range(40, 200))},
}  # fmt: skip


class Answer(NamedTuple):
    tokens: list[int]
    logprobs: list[dict[int, float]]
    finish_reason: str | None
    proof: Proof | None


class Left(NamedTuple):
    """A request that has left: its answer so far, all its tokens, and the path of its cache."""

    answer: Answer
    tokens: list[int]
    path: str


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "state")


def run(engine: Engine, name: str, until: int | None = None) -> Answer:
    """Step until the request has ended, or has `until` tokens."""
    core = engine.llm.llm_engine
    answer = Answer([], [], None, None)
    while core.has_unfinished_requests():
        for output in core.step():
            if output.request_id == name:
                # Outputs have a proof only when it has changed.
                newest = _answer(output)
                answer = newest._replace(proof=newest.proof or answer.proof)
        if answer.finish_reason or (until is not None and len(answer.tokens) >= until):
            break
    return answer


def _answer(output: Any) -> Answer:
    (completion,) = output.outputs
    logprobs = [{t: e.logprob for t, e in step.items()} for step in completion.logprobs or []]
    proof = proof_in(output.kv_transfer_params)
    return Answer(list(completion.token_ids), logprobs, completion.finish_reason, proof)


def leave(
    engine: Engine,
    ids: list[int],
    params: Any,
    after: int,
    path: str,
    continuation: Continuation | None = None,
) -> Left:
    if continuation is not None:
        add_continued(engine, "leaving", ids, params, continuation)
    else:
        engine.llm.llm_engine.add_request("leaving", {"prompt_token_ids": ids}, params)
    answer = run(engine, "leaving", until=after)
    (inside,) = (name for name in engine.scheduler.requests if name.startswith("leaving"))
    (tokens,) = engine.llm.collective_rpc("adakv_export", args=(inside, path, "ada_snapkv"))
    engine.llm.llm_engine.abort_request(["leaving"])
    assert tokens == [*ids, *answer.tokens]
    return Left(answer, tokens, path)


def go_on(engine: Engine, left: Left, prompt_tokens: int, params: Any, *, staged: bool) -> Answer:
    continuation = Continuation(prompt_tokens)
    if staged:
        arguments = ("arriving", left.path, "ada_snapkv", left.tokens)
        assert engine.llm.collective_rpc("adakv_stage", args=arguments) == [None]
        continuation = Continuation(prompt_tokens, "arriving", left.answer.proof)
    add_continued(engine, "arriving", left.tokens, params, continuation)
    return run(engine, "arriving")


def add_continued(
    engine: Engine, name: str, tokens: list[int], params: Any, continuation: Continuation
) -> None:
    """Add a continuation behind the front end's checks, which refuse those from clients."""
    core = engine.llm.llm_engine
    request = core.input_processor.process_inputs(
        name, {"prompt_token_ids": tokens}, params, supported_tasks=("generate",)
    )
    request.sampling_params.extra_args = continuation.as_extra_args()
    core.add_request(name, request, request.sampling_params)


@pytest.fixture
def others(engine: Engine) -> Iterator[None]:
    """Run compressed and uncompressed requests beside the test's own."""
    core = engine.llm.llm_engine
    for number, length in enumerate((300, 20, 700)):
        request = {"prompt_token_ids": prompt(length, seed=900 + number)}
        core.add_request(f"other-{number}", request, engine.params(max_tokens=400))
    yield
    core.abort_request([f"other-{number}" for number in range(3)])
    engine.flush()


@pytest.mark.parametrize("after", [12, 30, 33, 50])
@pytest.mark.usefixtures("others")
def test_it_goes_on_evicting_as_if_it_had_stayed(engine: Engine, after: int, path: str) -> None:
    ids = prompt(500, seed=42)
    # It evicts with every 32nd token, with the queries of the last 16.
    bound = {"adakv_decode_budget_tokens": 48, "adakv_decode_interval_tokens": 32}
    params = engine.params(max_tokens=120, extra_args=bound)
    engine.llm.llm_engine.add_request("staying", {"prompt_token_ids": ids}, params)
    staying = run(engine, "staying")
    left = leave(engine, ids, params, after, path)
    arrived = go_on(engine, left, len(ids), params, staged=True)
    assert [*left.answer.tokens, *arrived.tokens] == staying.tokens
    assert arrived.proof == staying.proof
    assert staying.proof is not None
    assert staying.proof.decode_evictions == 119 // 32


@pytest.mark.parametrize("way", WAYS_TO_SAMPLE)
@pytest.mark.usefixtures("others")
def test_it_goes_on_as_if_it_had_stayed(engine: Engine, way: str, path: str) -> None:
    ids = prompt(500, seed=41)
    params = engine.params(max_tokens=60, **WAYS_TO_SAMPLE[way])
    engine.llm.llm_engine.add_request("staying", {"prompt_token_ids": ids}, params)
    staying = run(engine, "staying")
    left = leave(engine, ids, params, 12, path)
    arrived = go_on(engine, left, len(ids), params, staged=True)
    assert [*left.answer.tokens, *arrived.tokens] == staying.tokens
    assert arrived.finish_reason == staying.finish_reason
    assert arrived.proof == staying.proof
    for mine, theirs in zip(
        [*left.answer.logprobs, *arrived.logprobs], staying.logprobs, strict=True
    ):
        assert mine.keys() == theirs.keys()
        assert all(abs(mine[token] - theirs[token]) < 1e-4 for token in mine)


def test_it_can_move_again(engine: Engine, path: str) -> None:
    ids, params = prompt(400, seed=42), engine.params(max_tokens=50)
    engine.llm.llm_engine.add_request("staying", {"prompt_token_ids": ids}, params)
    staying = run(engine, "staying")
    left = leave(engine, ids, params, 9, path)
    arguments = ("again", left.path, "ada_snapkv", left.tokens)
    assert engine.llm.collective_rpc("adakv_stage", args=arguments) == [None]
    again = Continuation(len(ids), "again", left.answer.proof)
    second = leave(engine, left.tokens, params, 40, path, again)
    assert second.tokens[: len(left.tokens)] == left.tokens
    arrived = go_on(engine, second, len(ids), params, staged=True)
    answers = (left.answer, second.answer, arrived)
    assert [token for answer in answers for token in answer.tokens] == staying.tokens


def test_without_its_cache_it_equals_a_new_request_with_all_its_tokens(
    engine: Engine, path: str
) -> None:
    ids, params = prompt(500, seed=43), engine.params(max_tokens=40)
    left = leave(engine, ids, params, 10, path)
    anew = go_on(engine, left, len(ids), params, staged=False)
    (fresh,) = engine.run([left.tokens], engine.params(max_tokens=30))
    assert anew.tokens == fresh.tokens
    assert anew.finish_reason == "length"
    assert anew.proof is not None
    assert anew.proof.original_tokens == 510


def _fingerprint_in(content: bytes) -> str:
    length = int.from_bytes(content[:8], "little")
    described = json.loads(content[8 : 8 + length])["__metadata__"]["header"]
    fingerprint: str = json.loads(described)[StateHeader._fields.index("fingerprint")]
    return fingerprint


def test_damaged_and_foreign_states_are_refused(engine: Engine, path: str) -> None:
    ids, params = prompt(300, seed=44), engine.params(max_tokens=30)
    left = leave(engine, ids, params, 5, path)

    def stage(path: str, policy: str, tokens: list[int]) -> str:
        (problem,) = engine.llm.collective_rpc("adakv_stage", args=("x", path, policy, tokens))
        assert problem is not None
        assert not engine.runner.adakv.moves.staged
        return problem

    assert "token_hash" in stage(left.path, "ada_snapkv", left.tokens[:-1])
    assert "policy" in stage(left.path, "snapkv", left.tokens)
    assert "cannot be read" in stage("/nowhere", "ada_snapkv", left.tokens)
    file = Path(f"{left.path}.0")
    whole = file.read_bytes()
    # As from an engine with other weights at the same path, or with other software.
    theirs = _fingerprint_in(whole)
    file.write_bytes(whole.replace(theirs.encode(), b"0" * len(theirs)))
    assert "fingerprint" in stage(left.path, "ada_snapkv", left.tokens)
    content = bytearray(whole)
    content[-100] ^= 1
    file.write_bytes(content)
    assert "checksum" in stage(left.path, "ada_snapkv", left.tokens)
    file.write_bytes(content[: len(content) // 2])
    assert "cannot be read" in stage(left.path, "ada_snapkv", left.tokens)
    engine.flush()


def test_clients_cannot_send_continuations(engine: Engine) -> None:
    params = engine.params(extra_args=Continuation(3, "made-up").as_extra_args())
    with pytest.raises(VLLMValidationError, match="cannot be set by requests"):
        engine.llm.llm_engine.add_request("forged", {"prompt_token_ids": [5, 6, 7]}, params)


def test_only_compressed_requests_of_this_engine_can_leave(engine: Engine, path: str) -> None:
    def export(name: str) -> Any:
        return engine.llm.collective_rpc("adakv_export", args=(name, path, "ada_snapkv"))

    assert export("nobody") == [None]
    request = {"prompt_token_ids": prompt(20, seed=45)}
    engine.llm.llm_engine.add_request("short", request, engine.params())
    run(engine, "short", until=2)
    assert export(next(iter(engine.scheduler.requests))) == [None]
    engine.llm.llm_engine.abort_request(["short"])
    engine.flush()
