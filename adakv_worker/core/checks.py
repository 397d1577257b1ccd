"""Invariants of the bookkeeping, for tests and for the setting `check_invariants`."""

from collections import Counter

from adakv_worker.core.manager import AdaKVManager
from adakv_worker.core.plan import UNBOUNDED
from adakv_worker.core.request import CompressedRequest, Phase


def check_blocks(manager: AdaKVManager) -> None:
    """Assert that every block is owned as often as it is counted and that none is lost."""
    pool = manager.block_pool
    owners = Counter(
        block.block_id
        for blocks in manager.req_to_blocks.values()
        for block in blocks
        if not block.is_null
    )
    for block in pool.blocks:
        if not block.is_null:
            assert block.ref_cnt == owners[block.block_id], f"block {block.block_id} is miscounted"
    used = sum(1 for block in pool.blocks if block.ref_cnt > 0 and not block.is_null)
    # The null block is neither free nor used.
    assert pool.get_num_free_blocks() + used == pool.num_gpu_blocks - 1, "blocks are lost"
    _check_sums(manager)
    for request_id, request in manager.requests.items():
        assert (request.phase is Phase.WHOLE) == (not request.plan.active)
        # One that arrives with its cache may still wait for slabs.
        if request.phase not in (Phase.PREFILL, Phase.WHOLE) and manager.req_to_blocks.get(
            request_id
        ):
            _check_slabs(manager, request_id)
    if manager.held is not None:
        manager.held.check()


def _check_sums(manager: AdaKVManager) -> None:
    """Assert that the running counts equal a recount."""
    held = {n: r for n, r in manager.requests.items() if manager.req_to_blocks.get(n)}
    compressed = _of_phase(held, Phase.COMPRESSED)
    assert manager.compressed == compressed
    assert manager.bounded == {n: r for n, r in compressed.items() if r.plan.bound is not None}
    resumed = _of_phase(held, Phase.RESUMED)
    assert manager.prefilling == _of_phase(held, Phase.PREFILL) | {
        name: request for name, request in resumed.items() if not request.completes_prompt
    }
    stats = manager.memory_stats()
    assert stats.compressed_blocks == sum(len(manager.req_to_blocks[n]) for n in compressed)
    assert stats.kept_tokens == sum(r.plan.keep for r in compressed.values())
    assert stats.original_tokens == sum(r.plan.prompt_tokens for r in compressed.values())
    assert manager.admission.most_blocks == sum(r.plan.most_blocks for r in held.values())
    for name, request in (compressed | resumed).items():
        blocks = len(manager.req_to_blocks[name])
        # An eviction's blocks are freed when the next step starts.
        needed = request.blocks_at(min(request.num_tokens, request.room_tokens or UNBOUNDED))
        assert needed <= blocks, f"{name}: no room"


def _of_phase(requests: dict[str, CompressedRequest], phase: Phase) -> dict[str, CompressedRequest]:
    return {name: request for name, request in requests.items() if request.phase is phase}


def _check_slabs(manager: AdaKVManager, request_id: str) -> None:
    slabs = manager.slabs_of(request_id)
    request = manager.requests[request_id]
    if request.phase is not Phase.RESUMED:
        assert len(slabs) >= request.plan.slabs, f"{request_id}: too few slabs"
    for block_id in slabs:
        block = manager.block_pool.blocks[block_id]
        assert block.ref_cnt == 1, f"slab {block_id} is shared"
        assert block.block_hash is None, f"slab {block_id} can be found as a prefix"
