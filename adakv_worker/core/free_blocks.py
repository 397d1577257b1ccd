"""The order in which vLLM's pool hands out its free blocks."""

from collections.abc import Iterator, Sequence
from itertools import islice

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock


def next_blocks(pool: BlockPool, count: int) -> Iterator[KVCacheBlock]:
    """Yield the free blocks that the pool hands out next, at most `count`."""
    return islice(_free(pool), count)


def _free(pool: BlockPool) -> Iterator[KVCacheBlock]:
    block = pool.free_block_queue.fake_free_list_head.next_free_block
    while block is not None and block.block_id >= 0:
        yield block
        block = block.next_free_block


def to_the_front(pool: BlockPool, blocks: Sequence[KVCacheBlock]) -> None:
    """Have the pool hand out these free blocks next. They belong to no prefix."""
    pool.touch(blocks)
    pool.free_blocks(blocks)
