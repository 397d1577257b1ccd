"""KV-cache manager: ordinary blocks until the prompt is complete, slabs afterwards."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.request import Request

from adakv_worker.core.admission import Admission
from adakv_worker.core.floor import Resumed
from adakv_worker.core.held import Held, ToHold
from adakv_worker.core.held_caches import HeldCaches
from adakv_worker.core.plan import Plan
from adakv_worker.core.request import CompressedRequest, Phase
from adakv_worker.messages import MemoryStats
from adakv_worker.spec import AdaKVSpec


class AdaKVManager(FullAttentionManager):
    """Gives out and takes back blocks according to each request's plan.

    It alone changes the requests, and only in `consider`, `allocate_new_blocks`, `evict`,
    `fall_back`, `hold`, `new_step_starts` and `pop_blocks_for_free`. Its other methods change no
    request.

    requests: those that hold blocks, and those that were considered last.
    prefilling: those that hold blocks and will be compressed when their prompts are complete.
    compressed: those that are compressed and hold blocks.
    bounded: the compressed ones that evict.
    reserved: those that this step compresses.
    completed: resumed ones whose prompts this step completes.
    page_tokens: entries of a page, the room of a block.
    held: the caches of ended and preempted requests; None without sessions.
    resuming: requests that this step began with slabs, and their held caches; None for a cache from
        another engine. Emptied when the step's commands are made.
    """

    held: HeldCaches | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.requests: dict[str, CompressedRequest] = {}
        self.prefilling: dict[str, CompressedRequest] = {}
        self.compressed: dict[str, CompressedRequest] = {}
        self.bounded: dict[str, CompressedRequest] = {}
        self.reserved: list[str] = []
        self.completed: list[str] = []
        assert isinstance(self.kv_cache_spec, AdaKVSpec)
        self.page_tokens = self.kv_cache_spec.page_tokens
        self.admission = Admission(
            self.block_pool, self.page_tokens, self.req_to_blocks, self.prefilling, self.compressed
        )
        self._stay_whole: list[str] = []
        self._evicting: list[str] = []
        self.resuming: dict[str, Held | None] = {}
        self._compressed_blocks = self._kept_tokens = self._original_tokens = 0

    # Queries.

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
        request = self.requests.get(request_id)
        if request is not None and request.has_slabs:
            needed = self._blocks_to_grow(request_id, request, num_tokens)
            if not apply_admission_cap:
                return needed
            return self.admission.blocks_to_admit(request_id, request, needed)
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
        slabs = 0
        if request is not None and _completes(request, num_tokens):
            shared = sum(block.ref_cnt > 1 for block in self.req_to_blocks.get(request_id, ()))
            shared += sum(block.ref_cnt > 0 for block in new_computed_blocks)
            slabs = 0 if _frees_too_little(request.plan, shared) else request.plan.slabs
        if apply_admission_cap:
            admitted = self.admission.blocks_to_admit(
                request_id, request if slabs else None, needed, slabs
            )
            return admitted + self._young_blocks()
        # Without room for its slabs it stays whole: it was admitted without them, or others have
        # grown otherwise than expected.
        return needed + slabs if self.admission.is_free(needed + slabs) else needed

    def _blocks_to_grow(self, request_id: str, request: CompressedRequest, num_tokens: int) -> int:
        """Return the blocks that a request with slabs needs for so many tokens."""
        if num_tokens <= request.room_tokens:
            return 0
        own = len(self.req_to_blocks.get(request_id, ()))
        needed = max(request.blocks_at(num_tokens) - own, 0)
        if request.plan.resumed is None or own:
            return needed
        # The held cache's blocks are free until it begins.
        return max(needed, self._blocks_taken_over(request.plan.resumed))

    def _young_blocks(self) -> int:
        """Return the blocks of young held caches, which a request without a cache does not take."""
        # Where nothing runs there is no step after which they would be older.
        waits = self.held is not None and (self.compressed or self.prefilling)
        return self.held.young_blocks() if self.held is not None and waits else 0

    def _blocks_taken_over(self, resumed: Resumed) -> int:
        """Return the blocks that a request is to take over from its held cache."""
        assert self.held is not None
        return 0 if resumed.copies else len(self.held.get(resumed.held).blocks)

    def slabs_of(self, request_id: str) -> list[int]:
        """Return the block ids of the slabs of a RESERVED, RESUMED or COMPRESSED request."""
        blocks, request = self.req_to_blocks[request_id], self.requests[request_id]
        if request.phase is Phase.RESERVED:
            blocks = blocks[request.plan.prompt_blocks :]
        return [block.block_id for block in blocks]

    def memory_stats(self) -> MemoryStats:
        """Return what the compressed requests hold."""
        stats = MemoryStats(
            compressed_blocks=self._compressed_blocks,
            kept_tokens=self._kept_tokens,
            original_tokens=self._original_tokens,
        )
        if (held := self.held) is None:
            return stats
        return stats._replace(
            held_blocks=held.blocks, sessions_held=len(held), dropped_sessions=dict(held.dropped)
        )

    # Changes.

    def consider(self, request_id: str, request: CompressedRequest) -> None:
        """Take a waiting request with a new plan."""
        self.requests[request_id] = request

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        request = self.requests.get(request_id)
        if request is None:
            return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        begins = request.num_tokens == 0
        request.grow(num_tokens)
        if request.has_slabs:
            return self._grow(request_id, request)
        new_blocks = super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)
        if begins:
            self._begin(request_id, request)
        elif new_blocks:
            # Chunks of a prompt and pauses are other than one token a step.
            self.admission.update(request_id, request)
        if not _completes(request, num_tokens):
            return new_blocks
        return new_blocks + self._reserve(request_id, request)

    def _begin(self, request_id: str, request: CompressedRequest) -> None:
        """Count a request that holds blocks from now on."""
        self.admission.begin(request_id, request)
        if request.phase is not Phase.WHOLE:
            self.prefilling[request_id] = request
        else:
            self._stay_whole.append(request_id)

    def _reserve(self, request_id: str, request: CompressedRequest) -> list[KVCacheBlock]:
        """Give slabs to a request whose prompt is complete, or let it stay whole."""
        del self.prefilling[request_id]
        shared = sum(block.ref_cnt > 1 for block in self.req_to_blocks[request_id])
        reason = "shared_prefix" if _frees_too_little(request.plan, shared) else None
        if reason is None and not self.admission.is_free(request.plan.slabs):
            reason = "no_room"
        if reason is not None:
            request.stay_whole(reason)
            self.admission.begin(request_id, request)
            self._stay_whole.append(request_id)
            return []
        request.reserve()
        self.reserved.append(request_id)
        slabs = self.block_pool.get_new_blocks(request.plan.slabs)
        self.req_to_blocks[request_id].extend(slabs)
        return slabs

    def _grow(self, request_id: str, request: CompressedRequest) -> list[KVCacheBlock]:
        """Give a request with slabs the blocks that its tokens need."""
        if request.num_tokens <= request.room_tokens:
            return []
        blocks = self.req_to_blocks[request_id]
        new_blocks = self._begin_with_slabs(request_id, request) if not blocks else []
        count = max(request.blocks_at(request.num_tokens) - len(blocks), 0)
        grown = self.block_pool.get_new_blocks(count) if count else []
        blocks.extend(grown)
        if request.phase is Phase.COMPRESSED:
            self._compressed_blocks += len(grown)
        elif request.completes_prompt:
            del self.prefilling[request_id]
            self.completed.append(request_id)
        request.hold(len(blocks))
        # Steps in which it was not scheduled are other than one token a step.
        self.admission.update(request_id, request)
        return new_blocks + grown

    def _begin_with_slabs(self, request_id: str, request: CompressedRequest) -> list[KVCacheBlock]:
        """Count a request that begins with its cache; return the cache's blocks that it takes."""
        blocks = self.req_to_blocks[request_id]
        if request.plan.resumed is not None:
            assert self.held is not None
            name, copies = request.plan.resumed.held, request.plan.resumed.copies
            held = self.held.lend(name) if copies else self.held.take(name)
            self.resuming[request_id] = held
            if not copies:
                blocks.extend(held.blocks)
            self._begin(request_id, request)
        else:
            # It came from another engine.
            self.admission.begin(request_id, request)
            self._count_compressed(request_id, request)
            if self.held is not None:
                self.resuming[request_id] = None
        return list(blocks)

    def _count_compressed(self, request_id: str, request: CompressedRequest) -> None:
        """Count a request among the compressed ones, with the blocks that it holds."""
        self.compressed[request_id] = request
        if request.plan.bound is not None:
            self.bounded[request_id] = request
        self._compressed_blocks += len(self.req_to_blocks[request_id])
        self._kept_tokens += request.plan.keep
        self._original_tokens += request.plan.prompt_tokens

    def evict(self, request_id: str) -> int:
        """Have a COMPRESSED request evict in this step; return the slabs that it keeps."""
        self._evicting.append(request_id)
        return self.requests[request_id].plan.slabs_after_eviction

    def fall_back(self, request_id: str) -> None:
        """Note that a request's policy raised an error."""
        if request := self.requests.get(request_id):
            request.fall_back()

    def take_whole(self) -> list[str]:
        """Return the requests that turned out to stay whole since the last call."""
        decided, self._stay_whole = self._stay_whole, []
        return decided

    def new_step_starts(self) -> None:
        self.admission.next_step()
        for request_id in [*self.reserved, *self.completed, *self._evicting]:
            self._finish_step(request_id)
        for finished in (self.reserved, self.completed, self._evicting):
            finished.clear()
        if self.held is not None:
            self.held.next_step()
        super().new_step_starts()

    def _finish_step(self, request_id: str) -> None:
        """Free what the last step's compression or eviction of a request has left empty."""
        request, blocks = self.requests.get(request_id), self.req_to_blocks.get(request_id)
        if request is None or not blocks:
            return
        if request.phase is Phase.RESERVED:
            # The prefix stays there.
            self.block_pool.free_blocks(reversed(blocks[: request.plan.prompt_blocks]))
            self.req_to_blocks[request_id] = blocks[request.plan.prompt_blocks :]
            self._note_compressed(request_id, request)
        elif request.phase is Phase.RESUMED and request_id in self.completed:
            self.req_to_blocks[request_id] = blocks[: request.plan.slabs]
            self.block_pool.free_blocks(reversed(blocks[request.plan.slabs :]))
            self._note_compressed(request_id, request)
        elif request_id in self._evicting:
            left = request.plan.slabs_after_eviction
            self.req_to_blocks[request_id] = blocks[:left]
            self.block_pool.free_blocks(reversed(blocks[left:]))
            self._compressed_blocks -= len(blocks) - left
            request.note_eviction(left)
            self.admission.update(request_id, request)

    def _note_compressed(self, request_id: str, request: CompressedRequest) -> None:
        """Note that a request holds nothing but its kept entries' slabs from now on."""
        request.compress(len(self.req_to_blocks[request_id]))
        self._count_compressed(request_id, request)
        self.admission.update(request_id, request)

    def hold(self, request_id: str, to_hold: ToHold) -> Held | None:
        """Hold a request's cache when its blocks are freed next.

        Returns the cache, without blocks; None if the workers have nothing to hold.
        """
        request = self.requests.get(request_id)
        if self.held is None or request is None or not self.req_to_blocks.get(request_id):
            return None
        if request_id in self.resuming:
            unsent, resumed = self.resuming.pop(request_id), request.plan.resumed
            if unsent is not None and resumed is not None and not resumed.copies:
                self.held.expect(request_id, unsent)
            return None
        if to_hold.entry_tokens >= request.plan.prompt_tokens:
            # The workers have finished the step, or will have before the next one.
            self._finish_step(request_id)
        held = request.leaves(to_hold, self.held.next_name(), self.block_size)
        if held is None:
            return None
        self.held.expect(request_id, held)
        return held

    def cache_blocks(self, request: Request, *args: Any, **kwargs: Any) -> None:
        # A slab's content belongs to no prefix: it must never be found by one.
        own = self.requests.get(request.request_id)
        if own is None or not own.has_slabs:
            super().cache_blocks(request, *args, **kwargs)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        request = self.requests.pop(request_id, None)
        self.admission.end(request_id)
        self.prefilling.pop(request_id, None)
        self.bounded.pop(request_id, None)
        if self.compressed.pop(request_id, None) is not None:
            assert request is not None
            self._compressed_blocks -= len(self.req_to_blocks[request_id])
            self._kept_tokens -= request.plan.keep
            self._original_tokens -= request.plan.prompt_tokens
        blocks = super().pop_blocks_for_free(request_id)
        return blocks if self.held is None else self.held.receive(request_id, blocks)


def _completes(request: CompressedRequest, num_tokens: int) -> bool:
    """Return whether a request that will be compressed has its whole prompt by then."""
    return request.phase is Phase.PREFILL and num_tokens >= request.plan.prompt_tokens


def _frees_too_little(plan: Plan, shared: int) -> bool:
    """Return whether compressing frees no more than it takes: others hold its blocks, too."""
    # A request that could outgrow its bound takes slabs all the same, to stay within it.
    return not plan.outgrows_bound and plan.prompt_blocks - shared <= plan.slabs
