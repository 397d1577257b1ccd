"""Follows vLLM's KV events: prefix blocks that an engine caches and evicts."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
import zmq
import zmq.asyncio
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVCacheEvent,
    KVEventBatch,
    ZmqEventPublisher,
)
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_utils import ExternalBlockHash

from adakv_serve.kernels.blocks import prefix_hash
from adakv_worker.salts import seed_hash
from adakv_worker.session_messages import HELD_MEDIUM

# A child of vLLM's logger, so that vLLM's settings apply.
logger = init_logger("vllm.adakv")

# A publisher answers between two batches, or ten times a second.
_REPLAY_S = 5.0


class Batch(NamedTuple):
    """One message of a publisher: a `KVEventBatch`, numbered without gaps from 0."""

    number: int
    payload: bytes


class CacheChange(NamedTuple):
    """Prefix blocks by `kernels.blocks.prefix_hash`. cleared: all other blocks are gone."""

    stored: list[int]
    removed: list[int]
    cleared: bool


class PrefixNames:
    """Names of an engine's cached blocks by their tokens. The engine's own hashes are salted.

    A prompt is cached in blocks, or by any number of held caches, or by both.
    """

    def __init__(self) -> None:
        self._names: dict[ExternalBlockHash, int] = {}
        self._in_blocks: set[ExternalBlockHash] = set()
        self._held: Counter[ExternalBlockHash] = Counter()

    def change(self, events: Iterable[KVCacheEvent]) -> CacheChange:
        """Take one batch of events, and return what it changes."""
        # A block's last event counts.
        present: dict[int, bool] = {}
        cleared = False
        for event in events:
            if isinstance(event, AllBlocksCleared):
                cleared = True
                self._names.clear()
                self._in_blocks.clear()
                self._held.clear()
                present.clear()
            elif isinstance(event, BlockStored):
                present |= dict.fromkeys(self._store(event), True)
            elif isinstance(event, BlockRemoved):
                present |= dict.fromkeys(self._remove(event), False)
        stored = [name for name, is_there in present.items() if is_there]
        removed = [name for name, is_there in present.items() if not is_there]
        return CacheChange(stored, removed, cleared)

    def _remove(self, event: BlockRemoved) -> list[int]:
        gone = []
        for block in event.block_hashes:
            if event.medium == HELD_MEDIUM:
                self._held[block] -= 1
            else:
                self._in_blocks.discard(block)
            if block not in self._in_blocks and self._held[block] <= 0:
                del self._held[block]
                if (name := self._names.pop(block, None)) is not None:
                    gone.append(name)
        return gone

    def _before(self, event: BlockStored) -> int | None:
        """Return the name before an event's first block; None if routers cannot know its blocks."""
        first, *later = _keys_beside(event) or [()]
        # Images give the same tokens other blocks, which routers leave out.
        if any(later):
            return None
        if event.parent_block_hash is not None:
            return None if first else self._names.get(event.parent_block_hash)
        if not first:
            return seed_hash(None, event.lora_name)
        is_salt = len(first) == 1 and isinstance(first[0], str)
        return seed_hash(first[0], event.lora_name) if is_salt else None

    def _store(self, event: BlockStored) -> list[int]:
        parent = self._before(event)
        if parent is None:
            return []
        names = []
        for index, block in enumerate(event.block_hashes):
            start = index * event.block_size
            parent = prefix_hash(parent, event.token_ids[start : start + event.block_size])
            self._names[block] = parent
            if event.medium == HELD_MEDIUM:
                self._held[block] += 1
            else:
                self._in_blocks.add(block)
            names.append(parent)
        return names


def _keys_beside(event: BlockStored) -> list[tuple[Any, ...]]:
    """Return what the hash of each block has beside tokens and adapter."""
    skipped = 0 if event.lora_name is None else 1
    return [tuple(keys or ())[skipped:] for keys in event.extra_keys or ()]


class EventSockets(NamedTuple):
    """Endpoints where an engine publishes its events, and where it repeats lost ones.

    folder: folder of endpoints that are Unix sockets of this engine, or None.
    """

    events: str
    replay: str
    folder: TemporaryDirectory[str] | None = None

    def remove(self) -> None:
        """Remove the folder, once the engine has ended."""
        if self.folder is not None:
            self.folder.cleanup()


class CacheFollower:
    """Turns published batches of events into changes, and asks again for lost batches."""

    def __init__(self, replay: Callable[[int], Awaitable[list[Batch]]]) -> None:
        """
        Args:
            replay: returns the batches from a number on that the engine still has, in order.
                Raises TimeoutError or zmq.ZMQError if the engine does not answer.
        """
        self._replay = replay
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)
        self._names = PrefixNames()
        self._expected = 0
        self._newest = -1

    async def take(self, batch: Batch) -> list[CacheChange]:
        """Return the changes of a published batch, after those of batches lost before it."""
        restarted = batch.number <= self._newest
        self._newest = batch.number
        if restarted:
            # A restarted engine counts from 0 again, and its cache is empty.
            self._expected = batch.number
            return [self._forget(), *self._read([batch])]
        if batch.number > self._expected:
            return self._read([*await self._lost(), batch])
        return self._read([batch])

    async def _lost(self) -> list[Batch]:
        try:
            return await self._replay(self._expected)
        except (TimeoutError, zmq.ZMQError) as error:
            logger.warning("no replay of KV events from %d on: %s", self._expected, error)
            return []

    def _read(self, batches: Iterable[Batch]) -> list[CacheChange]:
        changes = []
        for number, payload in batches:
            if number < self._expected:
                continue
            if number > self._expected:
                changes.append(self._forget())
            self._expected = number + 1
            try:
                changes.append(self._names.change(self._decoder.decode(payload).events))
            except msgspec.MsgspecError as error:
                logger.warning("cannot read KV events: %s", error)
                changes.append(self._forget())
        return [change for change in changes if any(change)]

    def _forget(self) -> CacheChange:
        """Start over, because a block may have been evicted unnoticed."""
        self._names = PrefixNames()
        return CacheChange([], [], cleared=True)


async def cache_changes(sockets: EventSockets) -> AsyncGenerator[CacheChange, None]:
    """Yield the changes of an engine on this machine, until closed."""
    context = zmq.asyncio.Context()
    socket = context.socket(zmq.SUB)
    follower = CacheFollower(partial(replayed, context, sockets.replay))
    try:
        socket.connect(sockets.events)
        socket.subscribe(b"")
        while True:
            _topic, number, payload = await socket.recv_multipart()
            for change in await follower.take(Batch(int.from_bytes(number, "big"), payload)):
                yield change
    finally:
        socket.close(linger=0)
        context.term()


async def replayed(context: zmq.asyncio.Context, endpoint: str, start: int) -> list[Batch]:
    """Ask a publisher for its batches from number `start` on."""
    batches: list[Batch] = []
    # A REQ socket takes only one of the many answers.
    with context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.connect(endpoint)
        async with asyncio.timeout(_REPLAY_S):
            await socket.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                _, _topic, number, payload = await socket.recv_multipart()
                if number == ZmqEventPublisher.END_SEQ:
                    return batches
                batches.append(Batch(int.from_bytes(number, "big"), payload))
