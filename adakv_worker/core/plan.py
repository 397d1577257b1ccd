"""What compression would do to one request, as arithmetic on its token counts."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from adakv_serve.kernels.blocks import (
    SINK_TOKENS,
    DecodeBound,
    blocks_for_tokens,
    compressed_blocks_bound,
    entries_after,
    most_entries,
)
from adakv_serve.kernels.policies.presets import PolicyChoice
from adakv_worker.config import FULL
from adakv_worker.core.floor import Resumed
from adakv_worker.messages import Kept, Proof
from adakv_worker.options import RequestBudget
from adakv_worker.session_messages import SessionProof

# Most queries that an eviction looks at beyond the policy's window: collecting them takes memory.
_EVICTION_SPAN = 64
# Stands for no bound, and stays exact in sums of thousands.
UNBOUNDED = 1 << 40


class Life(NamedTuple):
    """How a request that holds blocks, or will, fills them from now to its end.

    Room is counted in entries of a page. A block holds as many entries of each head as a page, or
    fewer whole tokens where pages store fewer bits.

    room: what fills its blocks now.
    most_room: what it never exceeds; `UNBOUNDED` if it grows to its end.
    per_token: room that another token takes.
    answered: tokens of its answer so far.
    left: most tokens that may still come.
    due: least tokens that will still come, whatever the answer is.
    max_tokens: its own limit, by which `AnswerLengths` groups requests.
    """

    room: float
    most_room: int
    per_token: float
    answered: int
    left: int
    due: int
    max_tokens: int


class Outputs(NamedTuple):
    """Known facts about a request's answer.

    answered: tokens so far.
    least: least tokens still to come, whatever the answer is.
    max_tokens: most tokens in all.
    """

    answered: int = 0
    least: int = 0
    max_tokens: int = 0


@dataclass(frozen=True)
class Plan:
    """The compression of one request at the end of its (next) prefill.

    prompt_tokens: tokens cached when it is compressed; after a preemption outputs are among them.
    keep: mean entries per (layer, KV head) that stay.
    query_span: number of the prompt's last tokens whose queries the policy looks at.
    max_outputs: most tokens that it may generate from then on.
    answered_before: tokens of its answer among `prompt_tokens`.
    least_outputs: least tokens that it will generate from then on, whatever the answer is.
    max_tokens: its own limit.
    skipped: why it will not be compressed, or None.
    fallback: why it is not compressed as it asked for, or None.
    bound: how far it may grow while it decodes. A request that could outgrow its bound takes slabs
        where there is room, even if all its entries are within the budget.
    resumed: the held cache that it begins with, or None.
    session: the record of that, or of why there is none; None without sessions.
    detail: whether the proof has a `HeadDetail`.
    page_tokens: entries of a page: more than a block has tokens where pages store fewer bits.
    """

    choice: PolicyChoice
    prompt_tokens: int
    keep: int
    query_span: int
    block_size: int
    page_tokens: int
    max_outputs: int
    answered_before: int = 0
    least_outputs: int = 0
    max_tokens: int = 0
    skipped: str | None = None
    fallback: str | None = None
    bound: DecodeBound | None = None
    resumed: Resumed | None = None
    session: SessionProof | None = None
    detail: bool = False

    @property
    def active(self) -> bool:
        return self.skipped is None

    @property
    def slabs(self) -> int:
        """Slabs for the kept entries."""
        return self._blocks_of(self.keep)

    @property
    def prompt_blocks(self) -> int:
        return blocks_for_tokens(self.prompt_tokens, self.block_size)

    @property
    def most_blocks(self) -> int:
        """Most blocks that it could come to hold, beside those of its prompt."""
        if not self.active:
            return blocks_for_tokens(self.prompt_tokens + self.max_outputs, self.block_size)
        most = self._blocks_of(most_entries(self.keep, self.max_outputs, self.bound))
        return most if self.resumed is None else max(most, self.blocks_to_extend)

    @property
    def blocks_to_extend(self) -> int:
        """Blocks that hold a resumed request when its prompt is complete, before compression."""
        return self.extended_blocks(self.prompt_tokens)

    def extended_blocks(self, num_tokens: int) -> int:
        """Return the blocks that hold a resumed request with `num_tokens` of its prompt."""
        assert self.resumed is not None
        return self._blocks_of(self.resumed.base.entries_at(num_tokens))

    @property
    def outgrows_bound(self) -> bool:
        """Whether it could exceed its bound if it kept its whole prompt."""
        whole = self.prompt_tokens + self.max_outputs
        return self.bound is not None and whole > self.bound.most_tokens

    @property
    def longest_hit(self) -> int:
        """Most tokens to take from the prefix cache, so that all needed queries are computed."""
        free = max(0, self.prompt_tokens - self.query_span)
        return free // self.block_size * self.block_size

    @property
    def sink_tokens(self) -> int:
        return SINK_TOKENS if self.bound is not None else 0

    @property
    def eviction_span(self) -> int:
        """Number of decoded tokens whose queries an eviction looks at."""
        if self.bound is None:
            return 0
        scorer = self.choice.build().scorer
        span = max(min(scorer.query_span_tokens, _EVICTION_SPAN), scorer.window_tokens)
        return min(span, self.bound.interval_tokens)

    @property
    def slabs_after_eviction(self) -> int:
        assert self.bound is not None
        return self._blocks_of(self.bound.budget_tokens)

    def blocks_at(self, num_tokens: int) -> int:
        """Return the blocks that surely hold the compressed request at `num_tokens` tokens."""
        return self._blocks_of(self.entries_at(num_tokens))

    def room_in(self, blocks: int, num_tokens: int) -> int:
        """Return the number of tokens up to which so many blocks hold it, with no eviction."""
        entries = blocks * self.page_tokens - self.page_tokens + 1
        return num_tokens + entries - self.entries_at(num_tokens)

    def grows_within(self, num_tokens: int, more: int) -> bool:
        """Return whether the compressed request needs another block for the next `more` tokens."""
        entries = self.entries_at(num_tokens)
        most = most_entries(entries, more, self.bound)
        return self._blocks_of(most) > self._blocks_of(entries)

    def evicts_at(self, num_tokens: int) -> bool:
        """Return whether the step that caches the last of `num_tokens` tokens ends by evicting."""
        return self.bound is not None and self.bound.evicts(self.keep, self._decoded(num_tokens))

    def next_eviction(self, num_tokens: int) -> int | None:
        """Return the number of tokens at the eviction after `num_tokens`; None if there is none."""
        if self.bound is None:
            return None
        tokens = num_tokens + self.bound.until_next(self.keep, self._decoded(num_tokens))
        return tokens if tokens < self.prompt_tokens + self.max_outputs else None

    def life_at(self, num_tokens: int) -> Life:
        """Return how the request fills blocks from `num_tokens` tokens to its end."""
        decoded = self._decoded(num_tokens)
        # Only its last block is half full, on average.
        half = self.page_tokens // 2
        per_token = 1.0 if self.active else self.page_tokens / self.block_size
        room, most = max(num_tokens, self.prompt_tokens) * per_token + half, UNBOUNDED
        if self.active:
            # A page that is only partly filled still belongs to its head alone.
            partly = self.page_tokens - 1 + half
            room = entries_after(self.keep, decoded, self.bound) + partly
            if self.bound is not None and self.keep + self.max_outputs > self.bound.most_tokens:
                most = self.bound.most_tokens + partly
        left = max(0, self.max_outputs - decoded)
        due = min(left, max(0, self.least_outputs - decoded))
        answered = self.answered_before + decoded
        return Life(room, most, per_token, answered, left, due, self.max_tokens)

    def proof(self, kept: Kept | None) -> Proof:
        """Return the proof, with the entries that the worker kept; None if it kept all."""
        n = self.prompt_tokens
        mean, least, most, detail = kept if kept is not None else Kept(float(n), n, n)
        return Proof(
            policy=self.choice.preset,
            original_tokens=n,
            kept_mean=round(mean, 3),
            kept_min=least,
            kept_max=most,
            blocks_before=self.prompt_blocks,
            blocks_after=self.prompt_blocks if kept is None else self.slabs,
            page_tokens=self.page_tokens,
            skipped=self.skipped,
            fallback=self.fallback,
            decode_budget_tokens=self.bound.budget_tokens if self.bound else None,
            decode_interval_tokens=self.bound.interval_tokens if self.bound else None,
            session=self.session,
            detail=detail,
        )

    def _decoded(self, num_tokens: int) -> int:
        return max(0, num_tokens - self.prompt_tokens)

    def entries_at(self, num_tokens: int) -> int:
        """Return the entries per head of the compressed request at `num_tokens` tokens."""
        return entries_after(self.keep, self._decoded(num_tokens), self.bound)

    def _blocks_of(self, entries: int) -> int:
        return compressed_blocks_bound(entries, 0, self.page_tokens)


def make_plan(
    budget: RequestBudget,
    num_tokens: int,
    remaining_outputs: int,
    block_size: int,
    pool_blocks: int,
    *,
    page_tokens: int | None = None,
    outputs: Outputs | None = None,
    resumable: bool = False,
) -> Plan:
    """Return the plan of a request that is about to compute its prompt.

    Whether the prompt shares blocks with others is decided later, when it is complete.

    Args:
        num_tokens: tokens to prefill.
        remaining_outputs: most tokens that it may still generate.
        pool_blocks: all blocks of the pool.
        page_tokens: entries of a page; None for as many as a block has tokens.
        resumable: whether more of its prompt may come after its answer (streaming input).
    """
    keep = budget.keep_of(num_tokens)
    choice = budget.choice_for(keep, num_tokens)
    # Nothing is chosen where all entries stay.
    span = query_span(choice) if keep < num_tokens else 0
    answered, least, max_tokens = outputs or Outputs(max_tokens=remaining_outputs)
    plan = Plan(
        choice, num_tokens, keep, min(span, num_tokens), block_size, page_tokens or block_size,
        remaining_outputs, answered_before=answered, least_outputs=least, max_tokens=max_tokens,
        bound=budget.decode, fallback=budget.fallback or budget.why_less(num_tokens),
        detail=budget.detail,
    )  # fmt: skip
    return replace(plan, skipped=_why_whole(plan, pool_blocks, resumable))


def resumed_plan(
    budget: RequestBudget,
    proof: Proof,
    num_tokens: int,
    remaining_outputs: int,
    block_size: int,
    outputs: Outputs,
    page_tokens: int | None = None,
) -> Plan:
    """Return the plan of a request that arrives with its compressed cache.

    Args:
        proof: what compression did to it in the other engine.
        num_tokens: all its tokens; the last one is not cached yet.
    """
    prompt_tokens, keep = proof.original_tokens, proof.keep
    decoded = num_tokens - prompt_tokens
    return Plan(
        budget.choice_for(keep, prompt_tokens),
        prompt_tokens,
        keep,
        0,
        block_size,
        page_tokens or block_size,
        decoded + remaining_outputs,
        answered_before=outputs.answered - decoded,
        least_outputs=decoded + outputs.least,
        max_tokens=outputs.max_tokens,
        # Without a policy to choose entries, none can be evicted.
        bound=proof.bound if budget.choice.preset != FULL else None,
    )


def query_span(choice: PolicyChoice) -> int:
    """Return the number of a prompt's last tokens whose queries a policy looks at."""
    if choice.preset == FULL:
        return 0
    scorer = choice.build().scorer
    return max(scorer.query_span_tokens, scorer.window_tokens)


def _why_whole(plan: Plan, pool_blocks: int, resumable: bool) -> str | None:
    """Return why a request is not compressed, or None."""
    if plan.choice.preset == FULL:
        return "full_requested"
    if resumable:
        return "resumable"
    # Pages of fewer bits are worth it where all entries stay, too.
    stays_whole = plan.keep >= plan.prompt_tokens and plan.page_tokens == plan.block_size
    if stays_whole and not plan.outgrows_bound:
        return "within_budget"
    if plan.max_outputs <= 1:
        return "no_decode"
    if plan.slabs >= plan.prompt_blocks and not plan.outgrows_bound:
        return "frees_nothing"
    if plan.prompt_blocks + plan.slabs > pool_blocks:
        return "no_room"
    return None
