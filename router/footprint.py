"""The KV blocks that a request will take, predicted before it runs."""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from adakv_serve.kernels.blocks import (
    DecodeBound,
    KeepLimit,
    blocks_for_tokens,
    compressed_blocks_bound,
    kept_tokens,
    most_entries,
    prefix_hash,
)

_REMEMBERED_OUTPUTS = 256


class Footprint(NamedTuple):
    """KV blocks and work of one request.

    peak_blocks: the most blocks at once: those of its prompt and of its slabs while it is
        compressed, or those at its end if they are more.
    steady_blocks: blocks at its expected end; with eviction the most from then on.
    prompt_tokens: exact length of the prompt.
    output_tokens: expected length of all answers.
    block_hashes: prefix hashes of the prompt's full blocks, for affinity.
    session: the session that its client names, as `router.session_hints.session_key`.
    holder: the replica that probably has most of its prompt cached, set when a replica is chosen.
    traceparent: the span below which its way is traced, in the W3C's form.
    booking: the name by which its ingress books it.
    """

    peak_blocks: int
    steady_blocks: int
    prompt_tokens: int
    output_tokens: int
    block_hashes: tuple[int, ...] = ()
    session: int | None = None
    holder: str | None = None
    traceparent: str | None = None
    booking: str | None = None


class Budget(NamedTuple):
    """Entries that compression keeps of a prompt, as in `adakv_worker.config.RequestBudget`."""

    budget_tokens: int
    keep_ratio: float
    decode: DecodeBound | None = None
    limit: KeepLimit | None = None


def predict(
    prompt_tokens: int,
    output_tokens: int,
    budget: Budget | None,
    block_size_tokens: int,
    block_hashes: tuple[int, ...] = (),
    *,
    answers: int = 1,
    most_output_tokens: int | None = None,
    page_tokens: int | None = None,
) -> Footprint:
    """Return the footprint of a request, as the scheduler of `adakv_worker` plans it.

    Args:
        output_tokens: expected tokens of each answer.
        budget: None for a request that stays uncompressed.
        answers: number of answers to the same prompt, which share its full blocks. Only the first
            one is compressed: for the others that would free nothing. Where answers may outgrow
            their bounds, all are.
        most_output_tokens: most tokens of each answer; None where there is no limit.
        page_tokens: entries of a compressed page; None for as many as a block has tokens.

    Raises:
        ValueError: a count is negative.
    """
    if output_tokens < 0:
        raise ValueError(f"output_tokens={output_tokens} is negative")
    prompt_blocks = blocks_for_tokens(prompt_tokens, block_size_tokens)
    outputs = answers * output_tokens
    # The last token of an answer is never cached.
    decoded = max(0, output_tokens - 1)
    shared = max(0, prompt_tokens - 1) // block_size_tokens
    own = blocks_for_tokens(prompt_tokens + decoded, block_size_tokens) - shared
    whole = shared + answers * own
    uncompressed = Footprint(whole, whole, prompt_tokens, outputs, block_hashes)
    if budget is None or (most_output_tokens is not None and most_output_tokens <= 1):
        return uncompressed
    kept = kept_tokens(prompt_tokens, *budget)
    page_tokens = page_tokens or block_size_tokens
    slabs = compressed_blocks_bound(kept, 0, page_tokens)
    # The scheduler decides by the longest possible answer, too.
    outgrows_bound = budget.decode is not None and (
        most_output_tokens is None or prompt_tokens + most_output_tokens > budget.decode.most_tokens
    )
    stays_whole = kept >= prompt_tokens and page_tokens == block_size_tokens
    if not outgrows_bound and (stays_whole or slabs >= prompt_blocks):
        return uncompressed
    most = most_entries(kept, decoded, budget.decode)
    compressed = answers if outgrows_bound else 1
    begin = shared + answers * (prompt_blocks - shared) + compressed * slabs
    end = compressed * compressed_blocks_bound(most, 0, page_tokens)
    if answers > compressed:
        end += shared + (answers - compressed) * own
    return Footprint(max(begin, end), end, prompt_tokens, outputs, block_hashes)


class OutputQuantiles:
    """Quantiles of an application's last 256 output lengths."""

    def __init__(self, prior_tokens: int = 256) -> None:
        """
        Args:
            prior_tokens: length that is expected before the first output.
        """
        self._recent: deque[int] = deque()
        self._sorted: list[int] = []
        self._prior_tokens = prior_tokens

    @property
    def count(self) -> int:
        """Outputs that it knows of, 256 at most."""
        return len(self._recent)

    def note(self, tokens: int) -> None:
        self._recent.append(tokens)
        insort(self._sorted, tokens)
        if len(self._recent) > _REMEMBERED_OUTPUTS:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]

    def expected(self, max_tokens: int | None, quantile: float = 0.75) -> int:
        """Return the quantile of the output lengths, at most `max_tokens`."""
        guess = self._prior_tokens
        if self._sorted:
            guess = self._sorted[min(len(self._sorted) - 1, int(quantile * len(self._sorted)))]
        return guess if max_tokens is None else min(guess, max_tokens)


def prefix_hashes(
    token_ids: Sequence[int], block_size_tokens: int, seed: int = 0
) -> tuple[int, ...]:
    """Return a hash for each full block of a prompt, of all tokens up to the block's end.

    vLLM's prefix cache finds full blocks only.

    Args:
        seed: hash before the first block, see `adakv_worker.salts.seed_hash`.
    """
    hashes: list[int] = []
    parent = seed
    for start in range(0, len(token_ids) - block_size_tokens + 1, block_size_tokens):
        parent = prefix_hash(parent, token_ids[start : start + block_size_tokens])
        hashes.append(parent)
    return tuple(hashes)
