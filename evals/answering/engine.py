"""An engine whose answers are forced and whose own choice of each token is recorded."""

import contextlib
import functools
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar, Protocol

from torch import Tensor
from transformers import AutoConfig
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from adakv_serve.evals.answering.rounding import ROUNDINGS, rounded_pages
from adakv_serve.evals.choice import FULL, Choice, Outcome
from adakv_serve.evals.samples import Sample, Tokens
from adakv_worker.frontend.validator import bound_by
from adakv_worker.plugin import engine_args

_NAME = "evals_name"


class Listener(Protocol):
    """Receiver of one request's logits."""

    outcome: Outcome

    def next_token(self, step: int, logits: Tensor) -> int | None:
        """Return the token to force, or None for the model's own."""
        ...


class _Beginning:
    """Listener that forces the beginning of an answer."""

    def __init__(self, forced: list[int]) -> None:
        self.outcome = Outcome()
        self._forced = forced

    def next_token(self, step: int, logits: Tensor) -> int | None:
        return self._forced[step] if step < len(self._forced) else None


class _Measuring:
    """Listener that forces a whole answer and records what the model prefers.

    It compares each distribution with the full cache's in `reference`, which the first one fills.
    """

    def __init__(self, tokens: Tokens, reference: list[Tensor], *, is_reference: bool) -> None:
        self.outcome = Outcome()
        self._tokens = tokens
        self._reference = reference
        self._is_reference = is_reference

    def next_token(self, step: int, logits: Tensor) -> int | None:
        tokens = self._tokens
        if step >= tokens.answer:
            self.outcome.predicted.append(int(logits.argmax()))
        if step >= tokens.compressed:
            logprobs = logits.float().log_softmax(-1)
            self._score(step - tokens.compressed, logprobs, tokens.forced[step])
        return tokens.forced[step]

    def _score(self, position: int, logprobs: Tensor, token: int) -> None:
        if self._is_reference:
            self._reference.append(logprobs)
        expected, outcome = self._reference[position], self.outcome
        outcome.surprise.append(-float(logprobs[token]))
        outcome.agreement.append(int(logprobs.argmax()) == int(expected.argmax()))
        divergence = (expected.exp() * (expected - logprobs)).sum()
        outcome.kl.append(max(0.0, float(divergence)))


class ForcedAnswers(AdapterLogitsProcessor):
    """Logits processor that forces tokens: it passes a request's logits to its listener."""

    listeners: ClassVar[dict[str, Listener]] = {}

    def is_argmax_invariant(self) -> bool:
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], Tensor], Tensor] | None:
        name = (params.extra_args or {}).get(_NAME)
        if name is None:
            return None
        return functools.partial(_force, self.listeners[name])


def _force(listener: Listener, output_ids: list[int], logits: Tensor) -> Tensor:
    token = listener.next_token(len(output_ids), logits)
    if token is None:
        return logits
    logits.fill_(float("-inf"))
    logits[token] = 0.0
    return logits


class ForcedEngine:
    """One engine in this process.

    Requests start one after the other and decode together: each finds the prompt in the prefix
    cache, and none shares its blocks with a request that still prefills.
    """

    def __init__(
        self,
        model: Path | str,
        context_tokens: int,
        kv_bytes: int | None = None,
        sessions: dict[str, Any] | None = None,
        page_dtype: str = "auto",
        page_rounding: str | None = None,
        **options: Any,
    ) -> None:
        """Start the engine.

        Args:
            kv_bytes: None for two whole contexts, at least 2 GiB.
            sessions: settings of sessions. The prefix cache is then off: the full cache's requests
                leave exact prefixes there, which would win.
            page_dtype: how pages of compressed prompts store numbers.
            page_rounding: a name in `ROUNDINGS`, simulated for all engines of this process until
                `close`; None for none.
        """
        from vllm import LLM

        # Bounds belong to the process; an `LLM` without statistics leaves the last engine's.
        bound_by(None)
        self._until_close = contextlib.ExitStack()
        if page_rounding is not None:
            self._until_close.enter_context(rounded_pages(ROUNDINGS[page_rounding]))
        config = AutoConfig.from_pretrained(model)
        self._llm = LLM(
            model=str(model),
            dtype="float32",
            max_model_len=context_tokens,
            block_size=32,
            kv_cache_memory_bytes=kv_bytes or _enough_bytes(config, context_tokens),
            enforce_eager=True,
            max_num_batched_tokens=2048,
            max_num_seqs=32,
            enable_prefix_caching=sessions is None,
            disable_log_stats=True,
            logits_processors=[ForcedAnswers],
            **engine_args(
                {"min_budget_tokens": 1, "sessions": sessions or {}, "page_dtype": page_dtype}
            ),
            **options,
        )
        self._count = 0

    def close(self) -> None:
        self._until_close.close()
        self._llm.llm_engine.engine_core.shutdown()

    @property
    def tokenizer(self) -> Any:
        return self._llm.get_tokenizer()

    def outcomes(
        self, sample: Sample, tokens: Tokens, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]:
        """Force a sample's answer under each choice; the full cache comes first."""
        reference: list[Tensor] = []
        full = Choice(FULL)

        def answer(some: list[Choice]) -> dict[Choice, Outcome]:
            listeners: dict[Choice, Listener] = {
                choice: _Measuring(tokens, reference, is_reference=choice == full)
                for choice in some
            }
            return self._answer(tokens.prompt, len(tokens.forced), listeners)

        done = answer([full])
        done |= answer([choice for choice in choices if choice != full])
        for choice, outcome in list(done.items()):
            # Beside a request with the full cache, compression would free nothing.
            if outcome.skipped == "shared_prefix":
                done |= answer([choice])
        return done

    def answers(
        self, prompt: list[int], begin: list[int], max_tokens: int, choices: Iterable[Choice]
    ) -> dict[Choice, Outcome]:
        """Return the model's own answers as `predicted`.

        Args:
            begin: tokens forced before the answer.
        """
        done: dict[Choice, Outcome] = {}
        for choice in choices:
            # One by one: beside a request with the full cache, compression would free nothing.
            begun: dict[Choice, Listener] = {choice: _Beginning(begin)}
            # A chat format may end a turn within the forced tokens.
            ends = not begin
            done |= self._answer(prompt, len(begin) + max_tokens, begun, ends_with_eos=ends)
        eos = self.tokenizer.eos_token_id
        for outcome in done.values():
            answer = outcome.tokens[len(begin) :]
            outcome.predicted = answer[: answer.index(eos)] if eos in answer else answer
        return done

    def _answer(
        self,
        prompt: list[int],
        max_tokens: int,
        listeners: dict[Choice, Listener],
        *,
        ends_with_eos: bool = False,
    ) -> dict[Choice, Outcome]:
        engine = self._llm.llm_engine
        asked: dict[str, Choice] = {}
        done: dict[Choice, Outcome] = {}
        waiting = list(listeners)
        while waiting or engine.has_unfinished_requests():
            if waiting:
                choice = waiting.pop(0)
                self._count += 1
                name = f"sample-{self._count}"
                asked[name] = choice
                ForcedAnswers.listeners[name] = listeners[choice]
                params = _params(max_tokens, name, choice, ignore_eos=not ends_with_eos)
                engine.add_request(name, {"prompt_token_ids": prompt}, params)
            for output in engine.step():
                if output.finished:
                    done[asked[output.request_id]] = _finished(output)
        return done


def _enough_bytes(config: Any, context_tokens: int) -> int:
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    of_a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * dim * 4
    return max(2 << 30, 2 * context_tokens * of_a_token)


def _params(max_tokens: int, name: str, choice: Choice, *, ignore_eos: bool) -> SamplingParams:
    return SamplingParams(
        temperature=0.0,
        max_tokens=max_tokens,
        ignore_eos=ignore_eos,
        detokenize=False,
        extra_args={_NAME: name, **choice.xargs()},
    )


def _finished(output: Any) -> Outcome:
    outcome = ForcedAnswers.listeners.pop(output.request_id).outcome
    outcome.tokens = list(output.outputs[0].token_ids)
    proof = (output.kv_transfer_params or {}).get("kv_compression")
    if proof is not None:
        outcome.kept_tokens, outcome.skipped = proof["kept_mean"], proof["skipped"]
    return outcome
