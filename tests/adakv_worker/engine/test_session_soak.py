"""Many conversations in little memory, with cuts, aborts, preemptions and resets."""

import random
from pathlib import Path
from typing import Any

import pytest

from adakv_worker.core.answer_lengths import AnswerLengths
from tests.adakv_worker.engines import VOCABULARY, Engine

# Without waits by the clock, so that equal seeds give equal runs.
SESSIONS = {
    "enabled": True, "min_saved_tokens": 16, "share": 0.5, "max_held": 40, "patience_s": 0,
    "overtake_s": 1e9,
}  # fmt: skip
_HOST_BYTES = 30 * 4 * 2 * 32 * 2 * 32 * 4
# 40 blocks of 4 layers, 2 heads, 32 entries of keys and values of 32 numbers.
_MEMORY = 41 * 4 * 2 * 32 * 2 * 32 * 4
_AT_ONCE = 16


class ShortAnswers(AnswerLengths):
    """Expects that answers are short, whatever it sees: so vLLM preempts."""

    def note(self, max_tokens: int, tokens: int) -> None:
        pass


class Talk:
    """One conversation, whose history a client may have edited."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.history = self._words(rng.randint(60, 260))
        self.asked_at = 0

    def _words(self, count: int) -> list[int]:
        return [self._rng.randrange(3, VOCABULARY) for _ in range(count)]

    def next_prompt(self) -> list[int]:
        choice = self._rng.random()
        if len(self.history) > 400:
            # A client drops the beginning, or begins anew.
            self.history = self.history[-200:]
        elif choice < 0.2:
            self.history = self.history[: -self._rng.randint(1, 40)]
        if choice < 0.8:
            self.history = self.history + self._words(self._rng.randint(1, 60))
        return self.history

    def take(self, answer: list[int]) -> None:
        self.history = self.history + answer


class Soak:
    """Clients that talk, leave and come back, and an engine whose every step is checked."""

    def __init__(
        self, engine: Engine, conversations: int, answer_tokens: int, seed: int = 1
    ) -> None:
        self._answer_tokens = answer_tokens
        self._rng = random.Random(seed)
        self._engine = engine
        self._core = engine.llm.llm_engine
        self._talks = [Talk(self._rng) for _ in range(conversations)]
        self._running: dict[str, Talk] = {}
        self.counts = dict.fromkeys(("turns", "resumed", "aborted", "preempted", "reset"), 0)

    def run(self, turns: int) -> None:
        while self.counts["turns"] < turns or self._running:
            if self.counts["turns"] < turns and len(self._running) < _AT_ONCE:
                self._ask()
            self._disturb()
            for output in self._core.step():
                if output.finished:
                    self._finish(output)
            self._check()

    def _ask(self) -> None:
        free = [one for one in self._talks if one not in self._running.values()]
        # Most clients ask on at once.
        recent = sorted(free, key=lambda talk: -talk.asked_at)[:10]
        talk = self._rng.choice(recent if self._rng.random() < 0.7 else free)
        talk.asked_at = self.counts["turns"]
        name = f"turn-{self.counts['turns']}"
        self.counts["turns"] += 1
        options = {"adakv_decode_budget_tokens": 64} if self._rng.random() < 0.1 else None
        params = self._engine.params(
            max_tokens=self._rng.randint(1, self._answer_tokens),
            logprobs=None,
            extra_args=options,
            ignore_eos=False,
        )
        self._core.add_request(
            name, {"prompt_token_ids": talk.next_prompt()}, params, priority=self._rng.randint(0, 3)
        )
        self._running[name] = talk

    def _disturb(self) -> None:
        chance = self._rng.random()
        scheduler = self._engine.scheduler
        if chance < 0.02 and self._running:
            name = self._rng.choice(list(self._running))
            self._core.abort_request([name])
            del self._running[name]
            self.counts["aborted"] += 1
        elif chance < 0.04 and scheduler.running:
            request = self._rng.choice(scheduler.running)
            scheduler.running.remove(request)
            scheduler._preempt_request(request, 0.0)
            self.counts["preempted"] += 1
        elif chance < 0.043 and not self._running:
            assert self._core.reset_prefix_cache()
            self.counts["reset"] += 1

    def _finish(self, output: Any) -> None:
        talk = self._running.pop(output.request_id)
        talk.take(list(output.outputs[0].token_ids))
        session = output.kv_transfer_params["kv_compression"]["session"]
        if session is not None and session["resumed_tokens"]:
            self.counts["resumed"] += 1

    def _check(self) -> None:
        held, pool = self._engine.manager.held, self._engine.manager.block_pool
        assert held.blocks <= SESSIONS["share"] * (pool.num_gpu_blocks - 1)
        in_pool = [one for one in held if one.source == "pool"]
        assert len(in_pool) <= SESSIONS["max_held"]


def soak(engine: Engine, conversations: int, turns: int, answer_tokens: int = 60) -> dict[str, int]:
    one = Soak(engine, conversations, answer_tokens)
    one.run(turns)
    engine.flush()
    engine.assert_nothing_leaked()
    assert one.counts["turns"] == turns
    assert all(one.counts[name] for name in ("resumed", "aborted", "preempted")), one.counts
    return {**one.counts, "all_preempted": engine.preemptions}


@pytest.fixture(
    params=["fcfs", pytest.param("priority", marks=(pytest.mark.slow, pytest.mark.long))]
)
def engine(request: pytest.FixtureRequest, in_process: None, gqa_model: Path) -> Any:
    sessions = {**SESSIONS, "host_bytes": _HOST_BYTES if request.param == "priority" else 0}
    settings = {"budget_tokens": 48, "keep_ratio": 0.3, "sessions": sessions}
    engine = Engine(
        gqa_model, settings, kv_cache_memory_bytes=_MEMORY, max_model_len=640,
        scheduling_policy=request.param,
    )  # fmt: skip
    engine.manager.admission.answer_lengths = ShortAnswers(prior_tokens=2)
    yield engine
    engine.close()


def test_no_turn_leaks_anything(engine: Engine) -> None:
    print(soak(engine, conversations=20, turns=200))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("engine", ["priority"], indirect=True)
def test_two_thousand_turns_leak_nothing(engine: Engine) -> None:
    print(soak(engine, conversations=200, turns=2000, answer_tokens=12))
