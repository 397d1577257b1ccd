"""Whether a request may start, by the blocks that the running ones will still take."""

from collections.abc import Mapping, Sequence

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from adakv_serve.kernels.blocks import blocks_for_tokens
from adakv_worker.core.answer_lengths import AnswerLengths
from adakv_worker.core.lives import LifeTable
from adakv_worker.core.request import CompressedRequest

# Steps for which a decision that a request waits holds, if nothing begins or ends.
_DECIDED_STEPS = 8
# Steps that a prefill may take without the others' growth getting in its way.
_PREFILL_STEPS = 4
# Length that answers are assumed to have until some have ended.
_PRIOR_OUTPUT_TOKENS = 512


class Holds:
    """Requests that have room now but wait until others have ended.

    Waiting saves a prefill that a preemption would repeat, but it rests on a forecast: so a request
    waits no longer than it would run itself. A decision is remembered for some steps, until a
    request begins or ends; asking again changes nothing.
    """

    def __init__(self) -> None:
        self._step = 0
        # The step in which each request's wait ends, and the step in which to decide again.
        self._until: dict[str, int] = {}
        self._again: dict[str, int] = {}

    def next_step(self) -> None:
        """Begin a step."""
        self._step += 1

    def changed(self, request_id: str) -> None:
        """Forget decisions: a request has begun, ended, or grown otherwise than expected."""
        self._again.clear()
        self._until.pop(request_id, None)

    def known(self, request_id: str) -> bool | None:
        """Return whether a request waits, or None if that is not decided."""
        if self._step >= self._until.get(request_id, self._step + 1):
            return False
        return True if self._step < self._again.get(request_id, 0) else None

    def decide(self, request_id: str, *, fits: bool, own_steps: int) -> bool:
        """Decide whether a request waits, and return it.

        Args:
            fits: whether all requests probably fit until it ends.
            own_steps: steps that it will probably run.
        """
        if fits:
            return False
        self._until.setdefault(request_id, self._step + max(1, own_steps))
        self._again[request_id] = self._step + _DECIDED_STEPS
        return True


class Admission:
    """The growth of the running requests, and whether another one may start beside it.

    most_blocks: most blocks that all requests with blocks could come to hold, by their plans.
    """

    def __init__(
        self,
        pool: BlockPool,
        page_tokens: int,
        blocks: Mapping[str, Sequence[KVCacheBlock]],
        prefilling: Mapping[str, CompressedRequest],
        compressed: Mapping[str, CompressedRequest],
    ) -> None:
        """
        Args:
            page_tokens: entries of a page, the room of a block.
            blocks: blocks of all requests, which the manager changes.
            prefilling, compressed: the manager's requests of these kinds, which it changes.
        """
        self.answer_lengths = AnswerLengths(_PRIOR_OUTPUT_TOKENS)
        self.most_blocks = 0
        self._pool = pool
        self._page_tokens = page_tokens
        self._blocks = blocks
        self._prefilling = prefilling
        self._compressed = compressed
        self._step = 0
        self._lives = LifeTable()
        self._most_blocks: dict[str, int] = {}
        self._holds = Holds()

    def next_step(self) -> None:
        """Begin a step, in which every request has grown by a token."""
        self._step += 1
        self._holds.next_step()

    def begin(self, request_id: str, request: CompressedRequest) -> None:
        """Count a request that holds blocks from now on, or whose plan has changed."""
        self._drop(request_id)
        self.most_blocks += request.plan.most_blocks
        self._most_blocks[request_id] = request.plan.most_blocks
        self.update(request_id, request)
        self._holds.changed(request_id)

    def update(self, request_id: str, request: CompressedRequest) -> None:
        """Note a request's life: it has grown otherwise than by one token per step."""
        self._lives.put(request_id, request.life, self._step)

    def end(self, request_id: str) -> None:
        """Stop counting a request, if it is counted."""
        self._drop(request_id)
        self._holds.changed(request_id)

    def _drop(self, request_id: str) -> None:
        self._lives.drop(request_id)
        self.most_blocks -= self._most_blocks.pop(request_id, 0)

    def growth_blocks(self) -> int:
        """Return the blocks that the running requests will take besides, at their peak."""
        lives = self._lives.lives(self.answer_lengths, self._step)
        peak = blocks_for_tokens(lives.peak_room(), self._page_tokens)
        return max(0, peak - self._shared_blocks() - self._used_blocks)

    def is_free(self, blocks: int) -> bool:
        """Return whether so many blocks are free."""
        return blocks <= self._pool.get_num_free_blocks()

    def blocks_to_admit(
        self, request_id: str, request: CompressedRequest | None, needed: int, slabs: int = 0
    ) -> int:
        """Return the blocks that must be free for a request to start.

        These are its own, and those that others take while it computes its prompt. A request that
        will be compressed also waits for its slabs, and while all together would not fit later:
        preempted once it is compressed, it would lose its slabs and compute its prompt again, most
        of whose blocks have been evicted by then.

        Args:
            request: a request that will be compressed, or is; None for others.
            needed: its own blocks, without slabs.
        """
        if not self.is_free(needed):
            return needed
        needed += self._promised_to_others(request_id)
        if request is None or not self.is_free(needed):
            return needed
        needed += self._growth_during_prefill(request_id)
        if self.is_free(needed) and self._waits(request_id, request, needed + slabs):
            return self._pool.num_gpu_blocks
        return needed

    def _waits(self, request_id: str, request: CompressedRequest, needed: int) -> bool:
        """Return whether a request whose prompt has room should wait until others have ended.

        Args:
            needed: blocks that must be free, slabs included.
        """
        blocks, room = self._pool.num_gpu_blocks - 1, self.is_free(needed)
        if not len(self._lives):
            return False
        if room and self.most_blocks + request.plan.most_blocks <= blocks:
            return False
        if (waits := self._holds.known(request_id)) is not None:
            return waits
        life = request.life
        to_come = self.answer_lengths.one_to_come(life)
        if not room:
            return self._holds.decide(request_id, fits=False, own_steps=int(to_come[0]))
        running = self._lives.lives(self.answer_lengths, self._step)
        peak = blocks_for_tokens(running.peak_with(life, to_come), self._page_tokens)
        fits = peak <= blocks or peak - self._shared_blocks() <= blocks
        return self._holds.decide(request_id, fits=fits, own_steps=int(to_come[0]))

    def _promised_to_others(self, request_id: str) -> int:
        """Return the blocks that admitted requests still take before their prompts are complete.

        Stock vLLM admits several prompts against the same free blocks, and preempts. A compressed
        request would then compute its whole prompt again.
        """
        # A request that resumes a longer cache than it needs has more: these blocks are its own.
        return sum(
            max(0, request.blocks_to_start - len(self._blocks[other]))
            for other, request in self._prefilling.items()
            if other != request_id
        )

    def _growth_during_prefill(self, request_id: str) -> int:
        """Return the blocks that compressed requests take while another's prompt is computed."""
        # In so few steps none takes more than one block.
        return sum(
            request.may_grow_within(_PREFILL_STEPS)
            for other, request in self._compressed.items()
            if other != request_id
        )

    def _shared_blocks(self) -> int:
        """Return how many blocks the lives count more than once, because requests share them."""
        held = sum(
            len(blocks) for name, blocks in self._blocks.items() if name not in self._prefilling
        )
        return max(0, held - self._used_blocks)

    @property
    def _used_blocks(self) -> int:
        return self._pool.num_gpu_blocks - 1 - self._pool.get_num_free_blocks()
