"""What the scheduler decides for one request, before any worker knows of it."""

import enum
from dataclasses import dataclass
from typing import NamedTuple

from adakv_worker.config import FULL
from adakv_worker.core.admission import UNBOUNDED, Life
from adakv_worker.messages import Kept, Proof
from adakv_worker.options import RequestBudget
from kernels.blocks import (
    SINK_TOKENS,
    DecodeBound,
    blocks_for_tokens,
    compressed_blocks_bound,
    entries_after,
    most_entries,
)
from kernels.policies.presets import PolicyChoice

# Queries that an eviction looks at beyond the policy's window, at most: while they are collected
# they take memory.
_EVICTION_SPAN = 64


class Phase(enum.Enum):
    """PREFILL: ordinary blocks. RESERVED: blocks and slabs, for one step. COMPRESSED: slabs."""

    PREFILL = enum.auto()
    RESERVED = enum.auto()
    COMPRESSED = enum.auto()


@dataclass
class Plan:
    """The compression of one request at the end of its (next) prefill.

    prompt_tokens: tokens cached when it compresses; after a preemption outputs are among them.
    keep: mean entries per (layer, KV head) that stay.
    slabs: blocks that hold them.
    max_outputs: tokens that it may generate from then on.
    num_tokens: tokens that it has blocks for.
    answered_before: tokens of its answer among the prompt's.
    least_outputs: that it will generate from then on, whatever the answer says.
    max_tokens: what it asked for.
    room_tokens: tokens that its blocks suffice for, while it is compressed and does not evict.
    skipped: why it will not compress, or None.
    fallback: why it is not compressed as it asked for, or None.
    bound: how far it may grow while it decodes. One that could outgrow it gets slabs where there is
        room, with all its entries where they are within the budget.
    """

    choice: PolicyChoice
    prompt_tokens: int
    keep: int
    query_span: int
    block_size: int
    max_outputs: int
    num_tokens: int = 0
    answered_before: int = 0
    least_outputs: int = 0
    max_tokens: int = 0
    room_tokens: int = 0
    skipped: str | None = None
    fallback: str | None = None
    bound: DecodeBound | None = None
    phase: Phase = Phase.PREFILL
    # Set when the last chunk is sized up, final when its blocks are taken.
    skip_if_taken_now: str | None = None

    @property
    def slabs(self) -> int:
        return compressed_blocks_bound(self.keep, 0, self.block_size)

    @property
    def prompt_blocks(self) -> int:
        return blocks_for_tokens(self.prompt_tokens, self.block_size)

    @property
    def start_tokens(self) -> int:
        """The request's tokens when it starts."""
        return self.num_tokens if self.phase is Phase.COMPRESSED else self.prompt_tokens

    @property
    def blocks_to_start(self) -> int:
        """Blocks that its prefill takes at its end, or its cache that came with it."""
        if self.phase is Phase.COMPRESSED:
            return self.blocks_at(self.num_tokens)
        return self.prompt_blocks + (self.slabs if self.active else 0)

    @property
    def generated(self) -> int:
        return max(0, self.num_tokens - self.prompt_tokens)

    def life(self) -> Life:
        """Return what admissions need: see there."""
        generated = max(0, self.num_tokens - self.prompt_tokens)
        # Its last block is half full on average, and no other's.
        half = self.block_size // 2
        tokens, most = max(self.num_tokens, self.prompt_tokens) + half, UNBOUNDED
        if self.skipped is None:
            # A page that is only partly filled is its head's all the same.
            partly = self.block_size - 1 + half
            tokens = entries_after(self.keep, generated, self.bound) + partly
            if self.bound is not None and self.keep + self.max_outputs > self.bound.most_tokens:
                most = self.bound.most_tokens + partly
        left = max(0, self.max_outputs - generated)
        due = max(0, self.least_outputs - generated)
        return Life(
            tokens, most, self.answered_before + generated, left, min(left, due), self.max_tokens
        )

    @property
    def most_blocks(self) -> int:
        """Most blocks that it could come to hold, beside those of its prompt."""
        if self.skipped is not None:
            return blocks_for_tokens(self.prompt_tokens + self.max_outputs, self.block_size)
        most = most_entries(self.keep, self.max_outputs, self.bound)
        return compressed_blocks_bound(most, 0, self.block_size)

    def has_room(self, blocks: int) -> None:
        """Note how many tokens so many blocks hold of the compressed request."""
        entries = blocks * self.block_size - self.block_size + 1
        self.room_tokens = self.num_tokens + entries - self._entries_at(self.num_tokens)

    @property
    def outgrows_bound(self) -> bool:
        """Whether it could come to hold more than it may, if it kept its whole prompt."""
        whole = self.prompt_tokens + self.max_outputs
        return self.bound is not None and whole > self.bound.most_tokens

    @property
    def active(self) -> bool:
        return self.skipped is None

    def blocks_at(self, num_tokens: int) -> int:
        """Blocks that surely hold the compressed request at `num_tokens` tokens."""
        return compressed_blocks_bound(self._entries_at(num_tokens), 0, self.block_size)

    def grows_within(self, tokens: int) -> bool:
        """Whether the compressed request needs another block for the next tokens."""
        entries = self._entries_at(self.num_tokens)
        most = most_entries(entries, tokens, self.bound)
        now, then = (compressed_blocks_bound(e, 0, self.block_size) for e in (entries, most))
        return then > now

    def _entries_at(self, num_tokens: int) -> int:
        decoded = max(0, num_tokens - self.prompt_tokens)
        return entries_after(self.keep, decoded, self.bound)

    @property
    def evicts(self) -> bool:
        """Whether the step that it now has blocks for ends with an eviction."""
        return self.bound is not None and self.bound.evicts(self.keep, self.generated)

    @property
    def next_eviction(self) -> int | None:
        """Tokens that will be cached when it next evicts, after this step; None if it will not."""
        if self.bound is None:
            return None
        tokens = self.num_tokens + self.bound.until_next(self.keep, self.generated)
        return tokens if tokens < self.prompt_tokens + self.max_outputs else None

    @property
    def eviction_span(self) -> int:
        """Queries of decoded tokens that an eviction looks at."""
        if self.bound is None:
            return 0
        scorer = self.choice.build().scorer
        span = max(min(scorer.query_span_tokens, _EVICTION_SPAN), scorer.window_tokens)
        return min(span, self.bound.interval_tokens)

    @property
    def slabs_after_eviction(self) -> int:
        assert self.bound is not None
        return compressed_blocks_bound(self.bound.budget_tokens, 0, self.block_size)

    @property
    def sink_tokens(self) -> int:
        return SINK_TOKENS if self.bound is not None else 0

    def longest_hit(self) -> int:
        """Most tokens that may come from the prefix cache, so that all queries needed are seen."""
        free = max(0, self.prompt_tokens - self.query_span)
        return free // self.block_size * self.block_size

    def proof(self, kept: Kept | None) -> Proof:
        """Return the proof, with the entries that the worker kept; None if it kept all."""
        n = self.prompt_tokens
        mean, least, most = kept if kept is not None else (float(n), n, n)
        return Proof(
            policy=self.choice.preset,
            original_tokens=n,
            kept_mean=round(mean, 3),
            kept_min=least,
            kept_max=most,
            blocks_before=self.prompt_blocks,
            blocks_after=self.prompt_blocks if kept is None else self.slabs,
            skipped=self.skipped,
            fallback=self.fallback,
            decode_budget_tokens=self.bound.budget_tokens if self.bound else None,
            decode_interval_tokens=self.bound.interval_tokens if self.bound else None,
        )


class Outputs(NamedTuple):
    """What a request says of its answer.

    answered: tokens of it that are there.
    least: that will come from now on, whatever the answer says.
    max_tokens: most that it asked for in all.
    """

    answered: int = 0
    least: int = 0
    max_tokens: int = 0


def resumed_plan(
    budget: RequestBudget,
    proof: Proof,
    num_tokens: int,
    remaining_outputs: int,
    block_size: int,
    outputs: Outputs,
) -> Plan:
    """Of a request that comes with its compressed cache, as its proof says.

    Args:
        num_tokens: all its tokens, of which the last is not cached yet.
    """
    prompt_tokens, keep = proof.original_tokens, proof.keep
    return Plan(
        budget.choice_for(keep, prompt_tokens),
        prompt_tokens,
        keep,
        0,
        block_size,
        num_tokens - prompt_tokens + remaining_outputs,
        num_tokens=num_tokens,
        answered_before=outputs.answered - (num_tokens - prompt_tokens),
        least_outputs=num_tokens - prompt_tokens + outputs.least,
        max_tokens=outputs.max_tokens,
        # Where no policy says what to evict, nothing is.
        bound=proof.bound if budget.choice.preset != FULL else None,
        phase=Phase.COMPRESSED,
    )


def query_span(choice: PolicyChoice) -> int:
    """Of a prompt's last tokens, whose queries are wanted."""
    if choice.preset == FULL:
        return 0
    scorer = choice.build().scorer
    return max(scorer.query_span_tokens, scorer.window_tokens)


def make_plan(
    budget: RequestBudget,
    num_tokens: int,
    remaining_outputs: int,
    block_size: int,
    pool_blocks: int,
    *,
    outputs: Outputs | None = None,
    resumable: bool = False,
) -> Plan:
    """Decides by arithmetic alone; whether the prompt is shared is seen when it is complete.

    Args:
        num_tokens: tokens to prefill.
        remaining_outputs: tokens that it may still generate.
        pool_blocks: all blocks of the pool.
        outputs: what else there is to say of its answer.
        resumable: whether more of its prompt may come after its answer (streaming input).
    """
    keep = budget.keep_of(num_tokens)
    choice = budget.choice_for(keep, num_tokens)
    # Nothing is chosen where all stay.
    span = query_span(choice) if keep < num_tokens else 0
    answered, least, max_tokens = outputs or Outputs(max_tokens=remaining_outputs)
    plan = Plan(
        choice, num_tokens, keep, min(span, num_tokens), block_size, remaining_outputs,
        answered_before=answered, least_outputs=least, max_tokens=max_tokens,
        bound=budget.decode, fallback=budget.fallback or budget.why_less(num_tokens),
    )  # fmt: skip
    if choice.preset == FULL:
        plan.skipped = "full_requested"
    elif resumable:
        plan.skipped = "resumable"
    elif keep >= num_tokens and not plan.outgrows_bound:
        plan.skipped = "within_budget"
    elif remaining_outputs <= 1:
        plan.skipped = "no_decode"
    elif plan.slabs >= plan.prompt_blocks and not plan.outgrows_bound:
        plan.skipped = "frees_nothing"
    elif plan.prompt_blocks + plan.slabs > pool_blocks:
        plan.skipped = "no_room"
    return plan
