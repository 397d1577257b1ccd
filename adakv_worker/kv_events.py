"""vLLM's KV events: which prefix blocks an engine has cached and evicted."""

from collections.abc import AsyncIterator, Iterable
from typing import NamedTuple

import msgspec
import zmq
import zmq.asyncio
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
    KVEventBatch,
)
from vllm.v1.core.kv_cache_utils import ExternalBlockHash

from kernels.blocks import prefix_hash


class CacheChange(NamedTuple):
    """Prefix blocks by `kernels.blocks.prefix_hash`. cleared: all others are gone."""

    stored: list[int]
    removed: list[int]
    cleared: bool


class PrefixNames:
    """Names an engine's cached blocks by their tokens; the engine's own hashes are salted."""

    def __init__(self) -> None:
        self._names: dict[ExternalBlockHash, int] = {}

    def change(self, events: Iterable[KVCacheEvent]) -> CacheChange:
        """What one batch of events changes."""
        # In order, and the last word on a block counts.
        present: dict[int, bool] = {}
        cleared = False
        for event in events:
            if isinstance(event, AllBlocksCleared):
                cleared = True
                self._names.clear()
                present.clear()
            elif isinstance(event, BlockStored):
                present |= dict.fromkeys(self._store(event), True)
            elif isinstance(event, BlockRemoved):
                names = (self._names.pop(block, None) for block in event.block_hashes)
                present |= dict.fromkeys((name for name in names if name is not None), False)
        stored = [name for name, is_there in present.items() if is_there]
        removed = [name for name, is_there in present.items() if not is_there]
        return CacheChange(stored, removed, cleared)

    def _store(self, event: BlockStored) -> list[int]:
        # Adapters, images and salts make other blocks of the same tokens: nobody asks for those.
        if event.lora_name or any(event.extra_keys or ()):
            return []
        parent = 0
        if event.parent_block_hash is not None:
            known = self._names.get(event.parent_block_hash)
            if known is None:
                return []
            parent = known
        names = []
        for index, block in enumerate(event.block_hashes):
            start = index * event.block_size
            parent = prefix_hash(parent, event.token_ids[start : start + event.block_size])
            self._names[block] = parent
            names.append(parent)
        return names


async def cache_changes(endpoint: str) -> AsyncIterator[CacheChange]:
    """Follows the publisher of an engine of this machine, until cancelled."""
    names = PrefixNames()
    decoder = msgspec.msgpack.Decoder(KVEventBatch)
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.SUB)
    try:
        socket.connect(endpoint)
        socket.subscribe(b"")
        while True:
            _topic, _sequence, payload = await socket.recv_multipart()
            change = names.change(decoder.decode(payload).events)
            if any(change):
                yield change
    finally:
        socket.close(linger=0)
        context.term()
