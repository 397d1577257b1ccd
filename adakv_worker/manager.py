"""KV-cache spec and manager: ordinary blocks until the prompt is complete, slabs afterwards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from vllm.config import VllmConfig
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.kv_cache_interface import FullAttentionSpec
from vllm.v1.request import Request

from adakv_worker.admission import Life, OutputLengths, peak_tokens
from adakv_worker.plan import Phase, Plan
from adakv_worker.stats import MemoryStats
from kernels.blocks import blocks_for_tokens

# Steps that a prefill may take without the others' growth getting in its way.
_PREFILL_STEPS = 4
# Length that outputs are assumed to have until some have ended.
_PRIOR_OUTPUT_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class AdaKVSpec(FullAttentionSpec):
    """Full attention whose block-table rows also hold slabs, for the step that compresses.

    unsupported: (preset, reason) of those that cannot score the model's layers. A worker finds them
        in the loaded model, and the scheduler needs them.
    """

    unsupported: tuple[tuple[str, str], ...] = ()

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        return replace(super().merge(specs), unsupported=specs[0].unsupported)

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        # Slabs are fewer than the blocks they replace, or one more where all entries stay.
        return 2 * super().max_num_blocks_per_req(vllm_config, max_len) + 1


class AdaKVManager(FullAttentionManager):
    """Gives out and takes back blocks according to each request's plan.

    While a request is RESERVED its blocks are its prompt's blocks followed by its slabs.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.plans: dict[str, Plan] = {}
        self.output_lengths = OutputLengths(_PRIOR_OUTPUT_TOKENS)
        self._reserved: list[str] = []
        self._evicting: list[str] = []

    def slabs_of(self, request_id: str) -> list[int]:
        """Block ids of the slabs of a RESERVED or COMPRESSED request."""
        blocks, plan = self.req_to_blocks[request_id], self.plans[request_id]
        if plan.phase is Phase.RESERVED:
            blocks = blocks[plan.prompt_blocks :]
        return [block.block_id for block in blocks]

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
        if plan is not None:
            plan.num_tokens = num_tokens
            if plan.phase is Phase.COMPRESSED:
                needed = max(plan.blocks_at(num_tokens) - len(self.req_to_blocks[request_id]), 0)
                if apply_admission_cap:
                    needed = self._to_admit(needed, plan, request_id)
                return needed
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
        compresses = False
        if plan is not None and plan.active and num_tokens >= plan.prompt_tokens:
            plan.skip_if_taken_now = self._shared(plan, request_id, new_computed_blocks)
            compresses = plan.skip_if_taken_now is None
            needed += plan.slabs if compresses else 0
        if apply_admission_cap:
            needed = self._to_admit(needed, plan if compresses else None, request_id)
        return needed

    def _to_admit(self, needed: int, plan: Plan | None, request_id: str) -> int:
        """Blocks that must be free for a request to begin: `needed` and what others will need.

        Args:
            plan: of a request that is going to be compressed, or is.
        """
        needed += self._promised_to_others(request_id)
        if plan is None:
            return needed
        needed += self._growth_during_prefill(request_id)
        return max(needed, self._needed_for_peak(plan, request_id))

    def _growth_during_prefill(self, request_id: str) -> int:
        """Blocks that compressed requests take while another one's prompt is computed."""
        return sum(
            max(plan.most_blocks_within(_PREFILL_STEPS) - len(self.req_to_blocks[name]), 0)
            for name, plan in self._compressed()
            if name != request_id
        )

    def _needed_for_peak(self, plan: Plan, request_id: str) -> int:
        """Blocks that must be free now, so that all will fit when they have grown.

        A compressed request that vLLM preempts loses its slabs, and by then its prompt's blocks
        have mostly been evicted: it computes the prompt again. It is worth waiting instead.
        """
        running = self._lives(without=request_id)
        if not running:
            return 0
        return self._blocks_at_peak([*running, self._life(plan)]) - self._used_blocks

    def memory_stats(self) -> MemoryStats:
        """Of the requests that hold blocks."""
        compressed = list(self._compressed())
        return MemoryStats(
            compressed_blocks=sum(len(self.req_to_blocks[name]) for name, _ in compressed),
            growth_blocks=max(0, self._blocks_at_peak(self._lives()) - self._used_blocks),
            kept_tokens=sum(plan.keep for _, plan in compressed),
            original_tokens=sum(plan.prompt_tokens for _, plan in compressed),
        )

    def _compressed(self) -> Iterator[tuple[str, Plan]]:
        # One that came with its cache may still wait for blocks.
        for name, plan in self.plans.items():
            if plan.phase is Phase.COMPRESSED and self.req_to_blocks.get(name):
                yield name, plan

    @property
    def _used_blocks(self) -> int:
        return self.block_pool.num_gpu_blocks - 1 - self.block_pool.get_num_free_blocks()

    def _blocks_at_peak(self, lives: list[Life]) -> int:
        return blocks_for_tokens(peak_tokens(lives), self.block_size)

    def _lives(self, without: str | None = None) -> list[Life]:
        return [
            self._life(plan)
            for name, plan in self.plans.items()
            if name != without and self.req_to_blocks.get(name)
        ]

    def _life(self, plan: Plan) -> Life:
        to_come = self.output_lengths.to_come(plan.generated, plan.max_outputs - plan.generated)
        # Its last block is half full on average, and nobody else's.
        half = self.block_size // 2
        most = plan.most_held_tokens
        return Life(plan.held_tokens + half, to_come, None if most is None else most + half)

    def _promised_to_others(self, request_id: str) -> int:
        """Blocks that admitted requests still take before their prompts are complete.

        Stock vLLM admits a prompt against blocks that a half-prefilled one was admitted against
        too, and preempts. A compressed victim would pay with its whole prompt.
        """
        promised = 0
        for other, plan in self.plans.items():
            held = len(self.req_to_blocks.get(other, ()))
            if other != request_id and held and plan.active and plan.phase is Phase.PREFILL:
                promised += plan.prompt_blocks - held + plan.slabs
        return promised

    def _shared(
        self, plan: Plan, request_id: str, new_computed_blocks: Sequence[KVCacheBlock]
    ) -> str | None:
        """Why compressing would free no more than it takes: others hold the prompt's blocks too."""
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
        if plan is not None and plan.phase is Phase.COMPRESSED:
            blocks = self.req_to_blocks[request_id]
            grown = self._take(plan.blocks_at(num_tokens) - len(blocks))
            blocks.extend(grown)
            return grown
        new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if plan is None or not plan.active or num_tokens < plan.prompt_tokens:
            return new_blocks
        if plan.skip_if_taken_now is not None:
            plan.skipped = plan.skip_if_taken_now
            return new_blocks
        slabs = self._take(plan.slabs)
        self.req_to_blocks[request_id].extend(slabs)
        plan.phase = Phase.RESERVED
        self._reserved.append(request_id)
        return new_blocks + slabs

    def _take(self, count: int) -> list[KVCacheBlock]:
        return self.block_pool.get_new_blocks(count) if count > 0 else []

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        plan = self.plans.get(request.request_id)
        # A slab's content belongs to no prefix: it must never be found by one.
        if plan is None or plan.phase is not Phase.COMPRESSED:
            super().cache_blocks(request, *args, **kwargs)

    def new_step_starts(self) -> None:
        """Frees the prompt blocks of what the last step compressed; they stay evictable."""
        for request_id in self._reserved:
            plan = self.plans.get(request_id)
            if plan is None or plan.phase is not Phase.RESERVED:
                continue
            blocks = self.req_to_blocks[request_id]
            self.req_to_blocks[request_id] = blocks[plan.prompt_blocks :]
            self.block_pool.free_blocks(reversed(blocks[: plan.prompt_blocks]))
            plan.phase = Phase.COMPRESSED
        self._reserved.clear()
        self._free_evicted()
        super().new_step_starts()

    def evict(self, request_id: str) -> int:
        """Of a COMPRESSED request whose next step evicts: how many slabs that leaves it."""
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
        self._evicting.clear()

    def evictable_blocks(self) -> int:
        """Free blocks that still hold a prefix. Looks at every block of the pool."""
        return sum(
            block.ref_cnt == 0 and block.block_hash is not None for block in self.block_pool.blocks
        )

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        self.plans.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)
