"""Requests that go on from held caches answer as if every token saw exactly what it saw."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.policies.presets import PRESETS
from tests.adakv_worker.engines import Engine, Reference, Result, prompt

SESSIONS = {"enabled": True, "min_saved_tokens": 1, "share": 1.0}
_TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def engine(in_process: None, gqa_model: Path) -> Iterator[Engine]:
    settings = {"budget_tokens": 48, "keep_ratio": 0.5, "sessions": SESSIONS}
    engine = Engine(gqa_model, settings)
    yield engine
    engine.flush()
    engine.assert_nothing_leaked()
    engine.close()


@pytest.fixture(scope="module")
def reference(gqa_model: Path) -> Reference:
    return Reference(gqa_model)


class Conversation:
    """Turns of one conversation, and what each of its tokens has attended to.

    tokens: those of the last turn, its answer included.
    seen: [L, H, n, n] bool, the entries that each of them attended to.
    """

    def __init__(self, engine: Engine, reference: Reference, **options: Any) -> None:
        self._engine = engine
        self._reference = reference
        self._options = options
        self.tokens: list[int] = []
        self.seen = torch.zeros(0)
        self._kept = torch.zeros(0)
        self.proof: dict[str, Any] = {}

    @property
    def resumed(self) -> int:
        """Tokens of the last turn that were not computed."""
        return int(self.proof["session"]["resumed_tokens"])

    def turn(self, ids: list[int], max_tokens: int = 12) -> Result:
        """Ask with these tokens, and check the answer."""
        params = self._engine.params(max_tokens=max_tokens, extra_args=self._options or None)
        (result,) = self._engine.run([ids], params)
        self.note(result)
        return result

    def note(self, result: Result) -> None:
        assert result.proof is not None
        assert result.kept is not None
        self.proof = result.proof
        self._follow(result, self.resumed)
        logprobs = self._reference.seeing(self.tokens, self.seen)
        expected = logprobs[len(result.prompt) - 1 :]
        for step, (token, candidates) in enumerate(
            zip(result.tokens, result.logprobs, strict=True)
        ):
            for candidate, logprob in candidates.items():
                difference = abs(logprob - float(expected[step, candidate]))
                assert difference < _TOLERANCE, f"step {step}: off by {difference}"
            assert float(expected[step].max() - expected[step, token]) < _TOLERANCE

    def _follow(self, result: Result, resumed: int) -> None:
        n = len(result.prompt)
        tokens = [*result.prompt, *result.tokens]
        layers, heads = result.kept.shape[:2]
        seen = torch.ones((len(tokens), len(tokens)), dtype=torch.bool).tril()
        seen = seen.expand(layers, heads, -1, -1).clone()
        if resumed:
            assert tokens[:resumed] == self.tokens[:resumed]
            seen[:, :, :resumed, :resumed] = self.seen[:, :, :resumed, :resumed]
            before = self._kept[..., :resumed]
            seen[:, :, resumed:n, : before.shape[-1]] &= before[:, :, None]
        # Where all entries of the new turn stay, there is no record of them.
        kept = torch.nn.functional.pad(result.kept, (0, n - result.kept.shape[-1]), value=True)
        seen[:, :, n:, :n] &= kept[:, :, None, :]
        self.tokens, self.seen, self._kept = tokens, seen, kept


@pytest.mark.parametrize("policy", PRESETS)
def test_three_turns_go_on_from_the_cache(
    engine: Engine, reference: Reference, policy: str
) -> None:
    talk = Conversation(engine, reference, adakv_policy=policy)
    first = talk.turn(prompt(300, seed=1))
    assert talk.proof["session"]["skipped"] == "no_match"
    second = talk.turn([*first.prompt, *first.tokens, *prompt(90, seed=2)])
    # All but the last token of the answer, which was never an input.
    assert talk.proof["session"] == {
        "turn": 2, "resumed_tokens": 311, "computed_tokens": 91, "source": "pool", "skipped": None,
    }  # fmt: skip
    assert talk.proof["original_tokens"] == 402
    assert talk.proof["kept_mean"] == 201
    talk.turn([*second.prompt, *second.tokens, *prompt(90, seed=3)])
    assert talk.resumed == 413
    assert talk.proof["kept_mean"] == 252


def test_an_answer_is_asked_for_again(engine: Engine, reference: Reference) -> None:
    talk = Conversation(engine, reference)
    first = talk.turn(prompt(300, seed=4))
    again = talk.turn(first.prompt)
    assert talk.resumed == 299
    assert again.tokens == first.tokens
    assert talk.proof["kept_mean"] == 150
    # And the conversation goes on from there.
    talk.turn([*again.prompt, *again.tokens, *prompt(80, seed=5)])
    assert talk.resumed == 311


@pytest.mark.parametrize("common", [0, 1, 5, 11])
def test_a_cache_is_cut_back_to_the_common_part(
    engine: Engine, reference: Reference, common: int
) -> None:
    talk = Conversation(engine, reference)
    first = talk.turn(prompt(300, seed=6 + common))
    other = [(token - 2) % 317 + 3 for token in first.tokens[common:]]
    talk.turn([*first.prompt, *first.tokens[:common], *other, *prompt(70, seed=7)])
    assert talk.resumed == 300 + common


def test_a_prompt_that_differs_in_its_window_is_cut_there(
    engine: Engine, reference: Reference
) -> None:
    talk = Conversation(engine, reference, adakv_policy="snapkv")
    first = talk.turn(prompt(300, seed=20))
    # The last 32 entries of the prompt are whole; the one before may be gone.
    talk.turn([*first.prompt[:268], *prompt(60, seed=21)])
    assert talk.resumed == 268
    before = talk.turn(prompt(300, seed=22))
    talk.turn([*before.prompt[:267], *prompt(60, seed=23)])
    assert talk.resumed == 0


def test_new_turns_are_computed_in_chunks(engine: Engine, reference: Reference) -> None:
    talk = Conversation(engine, reference)
    first = talk.turn(prompt(200, seed=24))
    second = talk.turn([*first.prompt, *first.tokens, *prompt(1200, seed=25)])
    assert talk.resumed == 211
    assert talk.proof["kept_mean"] == 706
    talk.turn([*second.prompt, *second.tokens, *prompt(3, seed=26)])
    assert talk.resumed == 1423


def test_turns_of_many_lengths_share_a_batch(engine: Engine, reference: Reference) -> None:
    lengths = [200, 260, 320, 150]
    talks = [Conversation(engine, reference) for _ in lengths]
    params = engine.params(max_tokens=12)
    results = engine.run([prompt(n, seed=30 + n) for n in lengths], params)
    for new in ((1, 5, 60, 200), (300, 1, 2, 33)):
        for talk, result in zip(talks, results, strict=True):
            talk.note(result)
        asked = [
            [*result.prompt, *result.tokens, *prompt(count, seed=40 + count)]
            for result, count in zip(results, new, strict=True)
        ]
        # One that begins, one that stays whole, and one that is told to keep everything.
        others = [prompt(150, seed=50 + new[0]), prompt(20, seed=51), prompt(100, seed=52)]
        options = [
            params,
            params,
            engine.params(max_tokens=12, extra_args={"adakv_policy": "full"}),
        ]
        results = engine.run([*asked, *others], [params] * len(talks) + options)[: len(talks)]
    for talk, result in zip(talks, results, strict=True):
        talk.note(result)
        assert talk.resumed > 0


def test_all_turns_may_be_compressed_again(
    in_process: None, gqa_model: Path, reference: Reference
) -> None:
    sessions = {**SESSIONS, "compress": "all"}
    engine = Engine(gqa_model, {"budget_tokens": 64, "keep_ratio": 0.0, "sessions": sessions})
    talk = Conversation(engine, reference)
    last = talk.turn(prompt(300, seed=60))
    for turn in range(3):
        last = talk.turn([*last.prompt, *last.tokens, *prompt(50, seed=61 + turn)])
        assert talk.resumed == len(last.prompt) - 51
        assert talk.proof["kept_mean"] == 64
    engine.flush()
    engine.assert_nothing_leaked()
    engine.close()
