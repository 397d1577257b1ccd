"""What crosses a process inside the plug-in, with `session_messages`.

Between the engine core and its workers, `StepCommands` and `Answer` ride as attributes on vLLM's
own messages of a step: those are plain dataclasses, which keep attributes when pickled. From the
engine core to the front end, `StepFigures` ride in vLLM's statistics (see `statistics_carrier`) and
a `Proof` rides in a request's outputs. A `Continuation` goes the other way, with a request.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from adakv_serve.kernels.blocks import (
    DecodeBound,
    compressed_blocks_bound,
    entries_after,
    most_entries,
)
from adakv_serve.kernels.policies.presets import PolicyChoice
from adakv_worker.session_messages import SessionCommands, SessionProof

if TYPE_CHECKING:
    from vllm.sampling_params import SamplingParams
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.outputs import ModelRunnerOutput

_ATTRIBUTE = "adakv"
# The proof's name in an output's `kv_transfer_params`, and in the JSON that clients get.
PROOF_KEY = "kv_compression"
# The name in `SamplingParams.extra_args`. Only a front end may set it: see `frontend.validator`.
CONTINUATION_KEY = "adakv-continuation"
# Longest prompt whose `HeadDetail` lists its tokens: a proof may be sent more than once.
DETAIL_TOKENS = 8192
# A policy that looks at no queries.
WITHOUT_QUERIES = PolicyChoice("streaming_llm")


class Capture(NamedTuple):
    """Keep the queries of the last `query_span` of `prompt_tokens` tokens for a later step.

    That step completes them: they are the prompt, or all tokens cached at the next eviction.
    """

    prompt_tokens: int
    query_span: int


class Compress(NamedTuple):
    """Copy the entries that the policy keeps into `slabs` during this step's forward pass.

    The scorer looks at the queries of the last `query_span` of `prompt_tokens` tokens.
    sink_tokens: number of first entries that always stay.
    detail: whether the answer has a `HeadDetail`.
    """

    choice: PolicyChoice
    prompt_tokens: int
    query_span: int
    keep: int
    slabs: list[int]
    sink_tokens: int = 0
    detail: bool = False


class Evict(NamedTuple):
    """Cut a compressed request to `keep` entries, in its first `slabs`, after this forward pass.

    The scorer looks at the queries of the last `query_span` of `tokens` tokens.
    """

    choice: PolicyChoice
    tokens: int
    query_span: int
    keep: int
    slabs: int


class TakeUp(NamedTuple):
    """Split a new request's tokens: the first `prompt_tokens` are its prompt, the rest its answer.

    state: name of the staged cache to place in its blocks, which then are slabs; None without one.
    """

    prompt_tokens: int
    state: str | None


class Recompress(NamedTuple):
    """Cut a resumed request whose prompt this forward pass completes to its first `slabs`.

    The last `among` entries of each head compete for `keep` places per head on average; None: all
    entries do. The scorer looks at the queries of the last `query_span` of `tokens` tokens.
    """

    choice: PolicyChoice
    tokens: int
    query_span: int
    keep: int
    slabs: int
    among: int | None


class StepCommands(NamedTuple):
    """Commands of one scheduler step, by request id. Most steps have none."""

    capture: dict[str, Capture]
    compress: dict[str, Compress]
    take_up: dict[str, TakeUp]
    evict: dict[str, Evict]
    recompress: dict[str, Recompress]
    sessions: SessionCommands

    @classmethod
    def none(cls) -> "StepCommands":
        return cls({}, {}, {}, {}, {}, SessionCommands({}, [], [], {}))

    @property
    def needs_queries(self) -> bool:
        """Whether something looks at the step's queries."""
        return bool(self.capture or self.compress or self.evict or self.recompress)


_NO_COMMANDS = StepCommands.none()


class HeadDetail(msgspec.Struct, frozen=True):
    """Entries of a prompt that each head keeps, for requests that ask for them.

    kept: number by layer and KV head, over all tensor-parallel ranks.
    keeping: number of heads that keep a token's entry, by token; None if the prompt has more than
        `DETAIL_TOKENS`.
    """

    kept: list[list[int]]
    keeping: list[int] | None


class Kept(NamedTuple):
    """Mean, least and most entries that the heads of a compressed request keep.

    detail: the entries of each head, where the command asks for them.
    """

    mean: float
    least: int
    most: int
    detail: HeadDetail | None = None


class Answer(NamedTuple):
    """Results of a step's commands.

    kept: entries of the requests that were compressed.
    failed: requests whose policy raised an error in compressing or evicting.
    """

    kept: dict[str, Kept]
    failed: list[str]

    @property
    def is_empty(self) -> bool:
        return not self.kept and not self.failed


NO_ANSWER = Answer({}, [])


def attach_commands(scheduler_output: "SchedulerOutput", commands: StepCommands) -> None:
    """Send commands to the workers with a step."""
    setattr(scheduler_output, _ATTRIBUTE, commands)


def commands_of(scheduler_output: "SchedulerOutput") -> StepCommands:
    """Return a step's commands; none with stock vLLM's scheduler."""
    return getattr(scheduler_output, _ATTRIBUTE, _NO_COMMANDS)


def attach_answer(runner_output: "ModelRunnerOutput", answer: Answer) -> None:
    """Send an answer to the scheduler with a step's outputs."""
    setattr(runner_output, _ATTRIBUTE, answer)


def answer_of(runner_output: "ModelRunnerOutput") -> Answer:
    """Return the workers' answer to a step; an empty one if none came."""
    return getattr(runner_output, _ATTRIBUTE, NO_ANSWER)


class Proof(msgspec.Struct, frozen=True):
    """Record of what compression did to one request.

    original_tokens: tokens that were cached when the request was compressed.
    kept_mean, kept_min, kept_max: entries that its heads keep of them.
    blocks_before, blocks_after: blocks that it held before, and slabs after.
    page_tokens: entries of a page; a block has one for each head of each layer.
    skipped: why it was not compressed, or None.
    fallback: why it was not compressed as it asked for, or None.
    decode_budget_tokens, decode_interval_tokens: its decode bound, or None.
    decode_evictions: evictions so far.
    session: the cache that it began with, None without sessions.
    detail: what each head kept of the prompt; None unless the request asked for it.
    """

    policy: str
    original_tokens: int
    kept_mean: float
    kept_min: int
    kept_max: int
    blocks_before: int
    blocks_after: int
    page_tokens: int
    skipped: str | None = None
    fallback: str | None = None
    decode_budget_tokens: int | None = None
    decode_interval_tokens: int | None = None
    decode_evictions: int = 0
    session: SessionProof | None = None
    detail: HeadDetail | None = None

    @property
    def compressed(self) -> bool:
        return self.skipped is None

    @property
    def bound(self) -> DecodeBound | None:
        """How far the request may grow while it decodes."""
        if self.decode_budget_tokens is None or self.decode_interval_tokens is None:
            return None
        return DecodeBound(self.decode_budget_tokens, self.decode_interval_tokens)

    @property
    def keep(self) -> int:
        """Mean entries per (layer, KV head), as planned."""
        return round(self.kept_mean)

    @property
    def freed_blocks(self) -> int:
        # A request that takes slabs only to stay within its bound may free none.
        return max(0, self.blocks_before - self.blocks_after)

    @property
    def kept_share(self) -> float:
        return self.kept_mean / self.original_tokens

    def held_blocks(self, decoded: int) -> int:
        """Return the blocks of the compressed request after `decoded` more tokens."""
        entries = entries_after(self.keep, decoded, self.bound)
        return compressed_blocks_bound(entries, 0, self.page_tokens)

    def peak_blocks(self, decoded: int, more: int) -> int:
        """Return the most blocks that it holds during the `more` tokens after `decoded` ones."""
        entries = most_entries(entries_after(self.keep, decoded, self.bound), more, self.bound)
        return compressed_blocks_bound(entries, 0, self.page_tokens)

    def with_detail(self, detail: HeadDetail | None) -> "Proof":
        """Return the proof with another detail."""
        return msgspec.structs.replace(self, detail=detail)

    def as_json(self) -> dict[str, object]:
        """Return the proof as clients get it."""
        as_json: dict[str, object] = msgspec.to_builtins(self)
        return as_json


def with_proof(proof: Proof) -> dict[str, object]:
    """Return the `kv_transfer_params` that carry a proof."""
    return {PROOF_KEY: proof.as_json()}


def proof_in(kv_transfer_params: Mapping[str, object] | None) -> Proof | None:
    """Return the proof in an output's `kv_transfer_params`, or None.

    Raises:
        msgspec.ValidationError: there is something else under its name.
    """
    value = (kv_transfer_params or {}).get(PROOF_KEY)
    return None if value is None else msgspec.convert(value, Proof)


class Continuation(msgspec.Struct, frozen=True):
    """How a request goes on that began in another engine, or that left this one.

    Such a request has all its tokens so far as its prompt, and its first sampling parameters with a
    continuation beside them. Scheduler and workers then split prompt and answer again, so that
    penalties and token limits count as if it had never been away.

    prompt_tokens: number of its tokens that are its prompt.
    state: name under which all workers have staged its cache; None to compute it anew.
    proof: its proof of compression, for the staged cache.
    """

    prompt_tokens: int
    state: str | None = None
    proof: Proof | None = None

    def as_extra_args(self) -> dict[str, object]:
        """Return the `SamplingParams.extra_args` that carry it."""
        return {CONTINUATION_KEY: msgspec.to_builtins(self)}


def continuation_in(params: "SamplingParams | None") -> Continuation | None:
    """Return the continuation beside a request's sampling parameters, or None.

    Raises:
        msgspec.ValidationError: there is something else under its name.
    """
    value = (params.extra_args or {}).get(CONTINUATION_KEY) if params is not None else None
    return None if value is None else msgspec.convert(value, Continuation)


class StateRefused(ValueError):
    """A state that must not be restored here: it is of something else, or damaged."""


class MemoryStats(NamedTuple):
    """KV memory of one engine after a step.

    compressed_blocks: blocks of compressed requests.
    growth_blocks: blocks that the running requests will take besides, at the peak of their lives.
    waiting_blocks: blocks that starting all waiting requests would take, slabs included.
    queued_prefill_tokens: prompt tokens of admitted and waiting requests, not yet computed.
    kept_tokens, original_tokens: prompt tokens of the compressed requests, after and before.
    evictable_blocks: free blocks that still hold a prefix or a held cache, counted within the last
        second.
    held_blocks, sessions_held: free blocks of held caches, and their number.
    dropped_sessions: held caches that are gone since the engine's start, by reason.
    recomputed_tokens: tokens computed a second time since the engine's start, see `Recomputes`.
    decode_evictions: evictions since the last statistics, of requests at their bounds.
    selection_failures: requests since the last statistics whose policy raised an error.
    """

    compressed_blocks: int = 0
    growth_blocks: int = 0
    waiting_blocks: int = 0
    queued_prefill_tokens: int = 0
    kept_tokens: int = 0
    original_tokens: int = 0
    evictable_blocks: int = 0
    recomputed_tokens: int = 0
    decode_evictions: int = 0
    selection_failures: int = 0
    held_blocks: int = 0
    sessions_held: int = 0
    dropped_sessions: dict[str, int] | None = None


class StepWork(NamedTuple):
    """What an engine has computed since the last statistics.

    prefilled_tokens: prompt tokens, those of unfinished prefills and of recomputations included.
    decode_steps: steps in which answers grew.
    """

    prefilled_tokens: int = 0
    decode_steps: int = 0


class StepFigures(NamedTuple):
    """Figures of compression that go to the front end after a step.

    proofs: first proofs of requests whose prompts the step completed.
    last_received: id of the request that the scheduler added last, None before the first; the
        figures count all requests up to that one.
    """

    memory: MemoryStats
    proofs: list[Proof]
    last_received: str | None
    work: StepWork = StepWork()
