"""KV-cache manager: ordinary blocks until the prompt is complete, slabs afterwards."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from adakv_worker.core.admission import Holds, LifeTable, OutputLengths
from adakv_worker.core.plan import Phase, Plan
from adakv_worker.messages import MemoryStats
from kernels.blocks import blocks_for_tokens

# Steps that a prefill may take without the others' growth getting in its way.
_PREFILL_STEPS = 4
# Length that outputs are assumed to have until some have ended.
_PRIOR_OUTPUT_TOKENS = 512


class AdaKVManager(FullAttentionManager):
    """Gives out and takes back blocks according to each request's plan.

    While a request is RESERVED its blocks are its prompt's blocks followed by its slabs.

    plans: of all requests that hold blocks, and of those that were considered last.
    prefilling: those that hold blocks and are going to be compressed.
    compressed: those that are, and hold blocks.
    bounded: the compressed ones that evict.
    reserved: those that this step compresses.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, Plan] = {}
        self.prefilling: dict[str, Plan] = {}
        self.compressed: dict[str, Plan] = {}
        self.bounded: dict[str, Plan] = {}
        self.reserved: list[str] = []
        self.output_lengths = OutputLengths(_PRIOR_OUTPUT_TOKENS)
        self._decided: list[str] = []
        self._evicting: list[str] = []
        self._compressed_blocks = self._kept_tokens = self._original_tokens = 0
        self._step = 0
        self._lives = LifeTable()
        # Most blocks that all could come to, whenever each ends.
        self._most_blocks = 0
        self._holds = Holds()

    def slabs_of(self, request_id: str) -> list[int]:
        """Return the block ids of the slabs of a RESERVED or COMPRESSED request."""
        blocks, plan = self.req_to_blocks[request_id], self.plans[request_id]
        if plan.phase is Phase.RESERVED:
            blocks = blocks[plan.prompt_blocks :]
        return [block.block_id for block in blocks]

    def take_decided(self) -> list[str]:
        """Return the requests that hold blocks and will not be compressed, each one once."""
        decided, self._decided = self._decided, []
        return decided

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        plan = self.plans.get(request_id)
        if plan is not None and plan.phase is Phase.COMPRESSED:
            needed = 0
            if num_tokens > plan.room_tokens:
                held = len(self.req_to_blocks.get(request_id, ()))
                needed = max(plan.blocks_at(num_tokens) - held, 0)
            return self._to_admit(needed, plan, request_id) if apply_admission_cap else needed
        needed = super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap,
            prefill_end,
        )
        completes = plan is not None and plan.active and num_tokens >= plan.prompt_tokens
        slabs = 0
        if plan is not None and completes:
            plan.skip_if_taken_now = self._shared(plan, request_id, new_computed_blocks)
            slabs = plan.slabs if plan.skip_if_taken_now is None else 0
        if apply_admission_cap:
            return self._to_admit(needed, plan if slabs else None, request_id, slabs)
        if plan is not None and slabs and not self._is_free(needed + slabs):
            # It was admitted without them, or others have grown otherwise than expected.
            plan.skip_if_taken_now, slabs = "no_room", 0
        return needed + slabs

    def _is_free(self, blocks: int) -> bool:
        return blocks <= self.block_pool.get_num_free_blocks()

    def _to_admit(self, needed: int, plan: Plan | None, request_id: str, slabs: int = 0) -> int:
        """Return the blocks that must be free for a request to begin.

        Its own, and those that others need while it computes its prompt. One that is going to be
        compressed also waits for its slabs, and while all together would not fit later. A
        compressed request that vLLM preempts loses its slabs, and by then its prompt's blocks have
        mostly been evicted: it computes the prompt again.

        Args:
            needed: of its own, but the slabs.
            plan: of a request that is going to be compressed, or is.
        """
        if not self._is_free(needed):
            return needed
        needed += self._promised_to_others(request_id)
        if plan is None or not self._is_free(needed):
            return needed
        needed += self._growth_during_prefill(request_id)
        if self._is_free(needed) and self._waits(plan, request_id, needed + slabs):
            return self.block_pool.num_gpu_blocks
        return needed

    def _waits(self, plan: Plan, request_id: str, needed: int) -> bool:
        """Whether a request whose prompt has room had better wait until others have ended.

        Args:
            needed: what it takes with its slabs.
        """
        blocks, room = self.block_pool.num_gpu_blocks - 1, self._is_free(needed)
        if not len(self._lives) or (room and self._most_blocks + plan.most_blocks <= blocks):
            return False
        if (waits := self._holds.known(request_id)) is not None:
            return waits
        life = plan.life()
        to_come = self.output_lengths.one_to_come(life)
        if not room:
            return self._holds.decide(request_id, fits=False, own_steps=int(to_come[0]))
        running = self._lives.lives(self.output_lengths, self._step)
        peak = blocks_for_tokens(running.peak_with(life, to_come), self.block_size)
        fits = peak <= blocks or peak - self._shared_blocks() <= blocks
        return self._holds.decide(request_id, fits=fits, own_steps=int(to_come[0]))

    def _shared_blocks(self) -> int:
        """Return how many blocks the lives count more than once: several requests hold them."""
        held = sum(
            len(blocks)
            for name, blocks in self.req_to_blocks.items()
            if name not in self.prefilling
        )
        return max(0, held - self._used_blocks)

    def _growth_during_prefill(self, request_id: str) -> int:
        """Return the blocks that compressed requests take while another's prompt is computed."""
        # In so few steps none takes more than one block.
        return sum(
            plan.num_tokens + _PREFILL_STEPS > plan.room_tokens
            and (plan.bound is None or plan.grows_within(_PREFILL_STEPS))
            for name, plan in self.compressed.items()
            if name != request_id
        )

    def _promised_to_others(self, request_id: str) -> int:
        """Return the blocks that admitted requests still take before their prompts are complete.

        Stock vLLM admits a prompt against blocks that a half-prefilled one was admitted against
        too, and preempts. A compressed victim would pay with its whole prompt.
        """
        return sum(
            plan.prompt_blocks - len(self.req_to_blocks[other]) + plan.slabs
            for other, plan in self.prefilling.items()
            if other != request_id
        )

    def memory_stats(self) -> MemoryStats:
        """Return what the compressed requests hold."""
        return MemoryStats(
            compressed_blocks=self._compressed_blocks,
            kept_tokens=self._kept_tokens,
            original_tokens=self._original_tokens,
        )

    def growth_blocks(self) -> int:
        """Return what the running requests will take besides, at the peak of their lives."""
        lives = self._lives.lives(self.output_lengths, self._step)
        peak = blocks_for_tokens(lives.peak_tokens(), self.block_size)
        return max(0, peak - self._shared_blocks() - self._used_blocks)

    @property
    def most_blocks(self) -> int:
        """Most blocks that all requests that hold blocks could come to hold, by their plans."""
        return self._most_blocks

    @property
    def _used_blocks(self) -> int:
        return self.block_pool.num_gpu_blocks - 1 - self.block_pool.get_num_free_blocks()

    def _shared(
        self, plan: Plan, request_id: str, new_computed_blocks: Sequence[KVCacheBlock]
    ) -> str | None:
        """Return why compressing frees no more than it takes: others hold its blocks, too."""
        if plan.outgrows_bound:
            # It takes slabs to stay within it.
            return None
        own = self.req_to_blocks.get(request_id, ())
        shared = sum(block.ref_cnt > 1 for block in own)
        shared += sum(block.ref_cnt > 0 for block in new_computed_blocks)
        return "shared_prefix" if plan.prompt_blocks - shared <= plan.slabs else None

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        plan = self.plans.get(request_id)
        if plan is None:
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        begins = plan.num_tokens == 0
        plan.num_tokens = num_tokens
        if plan.phase is Phase.COMPRESSED:
            return self._grow(request_id, plan)
        new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if begins:
            self._begin(request_id, plan)
        elif new_blocks:
            # What was not one token a step is made up for: chunks of a prompt, and pauses.
            self._lives.put(request_id, plan.life(), self._step)
        if not plan.active or num_tokens < plan.prompt_tokens:
            return new_blocks
        self.prefilling.pop(request_id, None)
        if plan.skip_if_taken_now is not None:
            self._forget_life(request_id, plan)
            plan.skipped = plan.skip_if_taken_now
            self._note_life(request_id, plan)
            self._decided.append(request_id)
            return new_blocks
        slabs = self._take(plan.slabs)
        self.req_to_blocks[request_id].extend(slabs)
        plan.phase = Phase.RESERVED
        self.reserved.append(request_id)
        return new_blocks + slabs

    def _begin(self, request_id: str, plan: Plan) -> None:
        """A request holds blocks from now on."""
        self._note_life(request_id, plan)
        if plan.active:
            self.prefilling[request_id] = plan
        else:
            self._decided.append(request_id)

    def _grow(self, request_id: str, plan: Plan) -> list[KVCacheBlock]:
        """Give a COMPRESSED request the blocks that its tokens need."""
        if plan.num_tokens <= plan.room_tokens:
            return []
        blocks = self.req_to_blocks[request_id]
        if request_id not in self.compressed:
            # It came with its cache.
            self._note_life(request_id, plan)
            self._hold_compressed(request_id, plan)
        grown = self._take(plan.blocks_at(plan.num_tokens) - len(blocks))
        blocks.extend(grown)
        self._compressed_blocks += len(grown)
        plan.has_room(len(blocks))
        # Steps in which it was not scheduled are made up for.
        self._lives.put(request_id, plan.life(), self._step)
        return grown

    def _hold_compressed(self, request_id: str, plan: Plan) -> None:
        """Count a request among the compressed ones, with the blocks that it holds."""
        self.compressed[request_id] = plan
        if plan.bound is not None:
            self.bounded[request_id] = plan
        self._compressed_blocks += len(self.req_to_blocks[request_id])
        self._kept_tokens += plan.keep
        self._original_tokens += plan.prompt_tokens

    def _note_life(self, request_id: str, plan: Plan) -> None:
        self._lives.put(request_id, plan.life(), self._step)
        self._most_blocks += plan.most_blocks
        self._holds.changed(request_id)

    def _forget_life(self, request_id: str, plan: Plan) -> None:
        self._lives.drop(request_id)
        self._most_blocks -= plan.most_blocks

    def _take(self, count: int) -> list[KVCacheBlock]:
        return self.block_pool.get_new_blocks(count) if count > 0 else []

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # A slab's content belongs to no prefix: it must never be found by one.
        if request.request_id not in self.compressed:
            super().cache_blocks(request, *args, **kwargs)

    def new_step_starts(self) -> None:
        """Frees the prompt blocks of what the last step compressed; they stay evictable."""
        self._step += 1
        self._holds.next_step()
        for request_id in self.reserved:
            plan = self.plans.get(request_id)
            if plan is None or plan.phase is not Phase.RESERVED:
                continue
            blocks = self.req_to_blocks[request_id]
            self.req_to_blocks[request_id] = blocks[plan.prompt_blocks :]
            self.block_pool.free_blocks(reversed(blocks[: plan.prompt_blocks]))
            plan.phase = Phase.COMPRESSED
            self._hold_compressed(request_id, plan)
            self._lives.put(request_id, plan.life(), self._step)
            plan.has_room(len(self.req_to_blocks[request_id]))
        self.reserved.clear()
        self._free_evicted()
        super().new_step_starts()

    def evict(self, request_id: str) -> int:
        """Have a COMPRESSED request evict in this step; return the slabs that leaves it."""
        self._evicting.append(request_id)
        return self.plans[request_id].slabs_after_eviction

    def _free_evicted(self) -> None:
        """Frees the slabs that the last step's evictions left empty."""
        for request_id in self._evicting:
            plan, blocks = self.plans.get(request_id), self.req_to_blocks.get(request_id)
            if plan is None or not blocks:
                continue
            left = plan.slabs_after_eviction
            self.req_to_blocks[request_id] = blocks[:left]
            self.block_pool.free_blocks(reversed(blocks[left:]))
            self._compressed_blocks -= len(blocks) - left
            plan.has_room(left)
            self._lives.put(request_id, plan.life(), self._step)
        self._evicting.clear()

    def evictable_blocks(self) -> int:
        """Return the free blocks that still hold a prefix. Looks at every block of the pool."""
        return sum(
            block.ref_cnt == 0 and block.block_hash is not None for block in self.block_pool.blocks
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        plan = self.plans.pop(request_id, None)
        if plan is not None and request_id in self._lives:
            self._forget_life(request_id, plan)
        self._holds.changed(request_id)
        self.prefilling.pop(request_id, None)
        self.bounded.pop(request_id, None)
        if self.compressed.pop(request_id, None) is not None:
            assert plan is not None
            self._compressed_blocks -= len(self.req_to_blocks[request_id])
            self._kept_tokens -= plan.keep
            self._original_tokens -= plan.prompt_tokens
        return super().pop_blocks_for_free(request_id)
