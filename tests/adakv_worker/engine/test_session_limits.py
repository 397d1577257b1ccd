"""Held caches at their limits: full tables, requests in the middle of a prompt, and resets."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from adakv_worker.core.request import Phase
from adakv_worker.session_messages import ARRIVAL_KEY, HeldCard
from tests.adakv_worker.conversation import SESSIONS
from tests.adakv_worker.engines import Engine, prompt

# Bytes of one entry of all heads: four layers of two KV heads of 32 numbers.
ENTRY_BYTES = 4 * 2 * 2 * 32 * 4


def _engine(model: Path, sessions: dict[str, Any] | None = None, **options: Any) -> Engine:
    compression = {
        "budget_tokens": 48,
        "keep_ratio": 0.0,
        "sessions": {**SESSIONS, "compress": "all", **(sessions or {})},
        **options.pop("compression", {}),
    }
    return Engine(model, compression, kv_cache_memory_bytes=32 << 20, **options)


def _proof(output: Any) -> Any:
    return output.kv_transfer_params["kv_compression"]


def _ended(engine: Engine) -> Any:
    """Run until nothing is left; return the last output that has ended."""
    core, ended = engine.llm.llm_engine, None
    while core.has_unfinished_requests():
        for output in core.step():
            ended = output if output.finished else ended
    return ended


@pytest.mark.parametrize("seats", [1, 3])
def test_as_many_caches_as_may_be_held_beside_as_many_requests_as_may_run(
    in_process: None, gqa_model: Path, seats: int
) -> None:
    engine = _engine(gqa_model, {"max_held": seats}, max_num_seqs=seats)
    prompts = [prompt(100, seed=number) for number in range(4 * seats)]
    results = engine.run(prompts, engine.params(max_tokens=4))
    assert [len(result.tokens) for result in results] == [4] * len(prompts)
    # Next turns beside others: some copy the caches that others end.
    again = [
        [*result.prompt, *result.tokens, *prompt(40, seed=100 + number)]
        for number, result in enumerate(results[-seats:])
    ]
    both = [*again, *again, *(prompt(100, seed=200 + number) for number in range(seats))]
    assert len(engine.run(both, engine.params(max_tokens=4))) == len(both)
    assert len(engine.manager.held) <= seats
    engine.flush()
    engine.assert_nothing_leaked()
    engine.close()


def test_a_resumed_request_that_has_lost_its_own_cache(
    in_process: None, gqa_model: Path, tmp_path: Path
) -> None:
    """It goes on from an older one, is compressed again, and does not move before."""
    engine = _engine(
        gqa_model, compression={"keep_ratio": 0.25}, max_num_batched_tokens=256,
        max_model_len=2048,
    )  # fmt: skip
    core = engine.llm.llm_engine
    (first,) = engine.run([prompt(300, seed=11)], engine.params(max_tokens=4))
    turn = [*first.prompt, *first.tokens, *prompt(700, seed=12)]
    # The same answer asked for again takes the cache's place, in an older state.
    core.add_request("turn", {"prompt_token_ids": turn}, engine.params(max_tokens=40))
    core.add_request("again", {"prompt_token_ids": first.prompt}, engine.params(max_tokens=3))
    for _ in range(15):
        core.step()
    (request,) = engine.scheduler.running
    name = request.request_id
    engine.scheduler.running.remove(request)
    engine.scheduler._preempt_request(request, time.monotonic())
    own = max(engine.manager.held, key=lambda held: len(held.token_ids))
    engine.manager.held._drop(own, "reused")
    core.step()
    assert engine.manager.requests[name].phase is Phase.RESUMED
    assert request.num_computed_tokens < len(turn)
    moves = engine.runner.adakv.moves
    assert moves.export(name, str(tmp_path / "cache"), "auto") is None
    while engine.manager.requests[name].phase is Phase.RESUMED:
        core.step()
    assert moves.export(name, str(tmp_path / "cache"), "auto") is not None
    proof = _proof(_ended(engine))
    assert proof["kept_mean"] == pytest.approx(0.25 * proof["original_tokens"], abs=1)
    engine.flush()
    engine.close()


@pytest.mark.parametrize("host_bytes", [0, 64 << 20])
def test_a_reset_that_preempts_requests_forgets_what_they_leave(
    in_process: None, gqa_model: Path, host_bytes: int
) -> None:
    engine = _engine(gqa_model, {"host_bytes": host_bytes})
    core = engine.llm.llm_engine
    core.add_request("a", {"prompt_token_ids": prompt(200, seed=5)}, engine.params(max_tokens=40))
    for _ in range(5):
        core.step()
    assert engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert not len(engine.manager.held)
    # Its memory goes even if nothing else comes.
    core.abort_request(["a"])
    core.step()
    assert not engine.runner.adakv.state.held.cards
    engine.close()


def test_workers_find_caches_of_budgets_in_bytes(in_process: None, gqa_model: Path) -> None:
    engine = Engine(
        gqa_model,
        {"keep_bytes_ratio": 0.4, "budget_bytes": 48 * ENTRY_BYTES, "sessions": SESSIONS},
        kv_cache_memory_bytes=16 << 20,
    )
    (result,) = engine.run([prompt(200, seed=1)], engine.params(max_tokens=4))
    asked = np.array([*result.prompt, *result.tokens, 7, 8], dtype=np.int32)
    found = engine.runner.adakv.held_moves.find(None, None, asked.tobytes())
    assert found is not None
    assert found[1] == 203
    engine.flush()
    engine.close()


def test_held_caches_are_listed_and_found_while_others_decode(
    in_process: None, gqa_model: Path
) -> None:
    engine = _engine(gqa_model)
    (result,) = engine.run([prompt(200, seed=1)], engine.params(max_tokens=4))
    core = engine.llm.llm_engine
    core.add_request("b", {"prompt_token_ids": prompt(200, seed=2)}, engine.params(max_tokens=40))
    for _ in range(5):
        core.step()
    ((listed,),) = engine.llm.collective_rpc("adakv_list_held")
    core.step()
    asked = np.array([*result.prompt, *result.tokens, 7, 8], dtype=np.int32).tobytes()
    (found,) = engine.llm.collective_rpc("adakv_find_held", args=(None, None, asked))
    assert found == listed
    assert found[1] == 203
    _ended(engine)
    engine.flush()
    engine.close()


@pytest.mark.parametrize("policy", ["expected_attention", "streaming_llm", "auto"])
def test_of_a_new_turn_something_stays_whatever_the_turns_before_keep(
    in_process: None, gqa_model: Path, policy: str
) -> None:
    engine = _engine(gqa_model, {"compress": "newest"})
    options = engine.params(max_tokens=4, extra_args={"adakv_policy": policy})
    (first,) = engine.run([prompt(400, seed=3)], options)
    (second,) = engine.run([[*first.prompt, *first.tokens, *prompt(80, seed=4)]], options)
    assert second.kept is not None
    assert second.kept[..., 400:484].float().sum(-1).mean().item() == 32
    engine.flush()
    engine.close()


def test_caches_that_come_to_an_idle_engine_keep_to_their_memory(
    in_process: None, gqa_model: Path, tmp_path: Path
) -> None:
    engine = _engine(gqa_model, {"arrival_bytes": 1 << 20}, compression={"budget_tokens": 256})
    core, moves = engine.llm.llm_engine, engine.runner.adakv.held_moves
    held = engine.runner.adakv.state.held
    engine.run([prompt(600, seed=1)], engine.params(max_tokens=4))
    (name,) = held.cards
    fields = moves.export(name, str(tmp_path / "cache"))
    tokens = HeldCard.of_fields(fields).token_ids.tolist()
    for number in range(20):
        arrived = f"arrived-{number}"
        assert moves.arrive(arrived, str(tmp_path / "cache"), fields) is None
        params = SamplingParams(max_tokens=1, extra_args={ARRIVAL_KEY: fields})
        carrier = EngineCoreRequest(
            arrived, tokens, None, params, None, time.time(), None, None, None
        )
        client: Any = core.engine_core
        inner = client.engine_core
        inner.add_request(*inner.preprocess_add_request(carrier))
        while inner.scheduler.has_requests():
            inner.step_fn()
        assert sum(map(held.nbytes, held.cards)) - held.nbytes(name) <= 1 << 20
    engine.flush()
    engine.close()


def test_a_cache_that_never_fits_is_refused(
    in_process: None, gqa_model: Path, tmp_path: Path
) -> None:
    engine = _engine(gqa_model, {"arrival_bytes": 0})
    moves = engine.runner.adakv.held_moves
    engine.run([prompt(200, seed=1)], engine.params(max_tokens=4))
    (name,) = engine.runner.adakv.state.held.cards
    fields = moves.export(name, str(tmp_path / "cache"))
    assert "arrival_bytes" in moves.arrive("arrived", str(tmp_path / "cache"), fields)
    # Nobody is sent what all refuse.
    asked = HeldCard.of_fields(fields).token_bytes
    assert moves.find(None, None, asked) is not None
    assert moves.export_for(None, None, asked, float("inf"), str(tmp_path / "cache")) is None
    assert moves.list() == []
    engine.flush()
    engine.close()
