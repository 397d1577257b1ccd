"""What the scheduler decides for one request, before any worker knows of it."""

import enum
from dataclasses import dataclass
from typing import Any

from adakv_worker.config import FULL, RequestBudget
from kernels.blocks import blocks_for_tokens, compressed_blocks_bound
from kernels.presets import PolicyChoice


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
    num_tokens: tokens that it had blocks for when they were last counted.
    skipped: why it will not compress, or None.
    """

    choice: PolicyChoice
    prompt_tokens: int
    keep: int
    query_span: int
    block_size: int
    max_outputs: int
    num_tokens: int = 0
    skipped: str | None = None
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
    def blocks_to_start(self) -> int:
        """Blocks that its prefill takes at its end, or its cache that came with it."""
        if self.phase is Phase.COMPRESSED:
            return self.blocks_at(self.num_tokens)
        return self.prompt_blocks + (self.slabs if self.active else 0)

    @property
    def generated(self) -> int:
        return max(0, self.num_tokens - self.prompt_tokens)

    @property
    def held_tokens(self) -> int:
        """Tokens whose blocks it holds now, or will once it is compressed."""
        if self.skipped is not None:
            return self.num_tokens
        # A page that is only partly filled is its head's all the same.
        return self.keep + self.generated + self.block_size - 1

    @property
    def active(self) -> bool:
        return self.skipped is None

    def blocks_at(self, num_tokens: int) -> int:
        """Blocks that surely hold the compressed request at `num_tokens` tokens."""
        decoded = max(0, num_tokens - self.prompt_tokens)
        return compressed_blocks_bound(self.keep, decoded, self.block_size)

    def longest_hit(self) -> int:
        """Most tokens that may come from the prefix cache, so that all queries needed are seen."""
        free = max(0, self.prompt_tokens - self.query_span)
        return free // self.block_size * self.block_size

    def report(self, kept: tuple[float, int, int] | None) -> dict[str, Any]:
        """The proof that it ran (or why not): `kept` is the worker's mean, least and most."""
        n = self.prompt_tokens
        mean, least, most = kept if kept is not None else (float(n), n, n)
        return {
            "policy": self.choice.preset,
            "original_tokens": n,
            "kept_mean": round(mean, 3),
            "kept_min": least,
            "kept_max": most,
            "blocks_before": self.prompt_blocks,
            "blocks_after": self.prompt_blocks if kept is None else self.slabs,
            "skipped": self.skipped,
        }


def resumed_plan(
    budget: RequestBudget,
    report: dict[str, Any],
    num_tokens: int,
    remaining_outputs: int,
    block_size: int,
) -> Plan:
    """Of a request that comes with its compressed cache, as `Plan.report` told of it.

    Args:
        num_tokens: all its tokens, of which the last is not cached yet.
    """
    prompt_tokens = report["original_tokens"]
    return Plan(
        budget.choice,
        prompt_tokens,
        round(report["kept_mean"]),
        0,
        block_size,
        num_tokens - prompt_tokens + remaining_outputs,
        num_tokens=num_tokens,
        phase=Phase.COMPRESSED,
    )


def make_plan(
    budget: RequestBudget,
    num_tokens: int,
    remaining_outputs: int,
    block_size: int,
    pool_blocks: int,
) -> Plan:
    """Decides by arithmetic alone; whether the prompt is shared is seen when it is complete.

    Args:
        num_tokens: tokens to prefill.
        remaining_outputs: tokens that it may still generate.
        pool_blocks: all blocks of the pool.
    """
    span = 0
    if budget.choice.preset != FULL:
        scorer = budget.choice.build().scorer
        span = max(scorer.query_span_tokens, scorer.window_tokens)
    keep = budget.keep_of(num_tokens)
    plan = Plan(
        budget.choice, num_tokens, keep, min(span, num_tokens), block_size, remaining_outputs
    )
    if budget.choice.preset == FULL:
        plan.skipped = "full_requested"
    elif keep >= num_tokens:
        plan.skipped = "within_budget"
    elif remaining_outputs <= 1:
        plan.skipped = "no_decode"
    elif plan.slabs >= plan.prompt_blocks:
        plan.skipped = "frees_nothing"
    elif plan.prompt_blocks + plan.slabs > pool_blocks:
        plan.skipped = "no_room"
    return plan
