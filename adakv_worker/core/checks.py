"""Invariants of the bookkeeping, for tests and for the setting `check_invariants`."""

from collections import Counter

from adakv_worker.core.manager import AdaKVManager
from adakv_worker.core.plan import Phase


def check_blocks(manager: AdaKVManager) -> None:
    """Asserts that every block is owned as often as it is counted and that none is lost."""
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
    check_sums(manager)
    for request_id, plan in manager.plans.items():
        # One that came with its cache may still wait for slabs.
        if plan.phase is not Phase.PREFILL and manager.req_to_blocks.get(request_id):
            _check_slabs(manager, request_id)


def check_sums(manager: AdaKVManager) -> None:
    """Asserts that what is counted as requests come and go is what there is."""
    held = {name: plan for name, plan in manager.plans.items() if manager.req_to_blocks.get(name)}
    compressed = {n: p for n, p in held.items() if p.phase is Phase.COMPRESSED}
    prefilling = {n: p for n, p in held.items() if p.active and p.phase is Phase.PREFILL}
    assert manager.compressed == compressed
    assert manager.bounded == {n: p for n, p in compressed.items() if p.bound is not None}
    assert manager.prefilling == prefilling
    stats = manager.memory_stats()
    assert stats.compressed_blocks == sum(len(manager.req_to_blocks[n]) for n in compressed)
    assert stats.kept_tokens == sum(plan.keep for plan in compressed.values())
    assert stats.original_tokens == sum(plan.prompt_tokens for plan in compressed.values())
    assert manager.most_blocks == sum(plan.most_blocks for plan in held.values())
    for name, plan in compressed.items():
        blocks = len(manager.req_to_blocks[name])
        # An eviction's blocks are freed when the next step starts.
        assert plan.blocks_at(min(plan.num_tokens, plan.room_tokens)) <= blocks, f"{name}: no room"


def _check_slabs(manager: AdaKVManager, request_id: str) -> None:
    plan = manager.plans[request_id]
    blocks = manager.req_to_blocks[request_id]
    slabs = blocks[plan.prompt_blocks :] if plan.phase is Phase.RESERVED else blocks
    assert len(slabs) >= plan.slabs, f"{request_id} holds too few slabs"
    for block in slabs:
        assert block.ref_cnt == 1, f"slab {block.block_id} is shared"
        assert block.block_hash is None, f"slab {block.block_id} can be found as a prefix"
