"""An engine's KV events, named as the router names prefix blocks."""

import asyncio
import tempfile
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st
from vllm.distributed.kv_events import (
    AllBlocksCleared,
    BlockRemoved,
    BlockStored,
    KVEventBatch,
    ZmqEventPublisher,
)

from adakv_serve.router.footprint import prefix_hashes
from adakv_worker.frontend.kv_events import (
    Batch,
    CacheFollower,
    EventSockets,
    PrefixNames,
    cache_changes,
    replayed,
)
from adakv_worker.salts import seed_hash
from adakv_worker.session_messages import HELD_MEDIUM

BLOCK = 4


def stored(
    tokens: list[int], first: int = 0, parent: int | None = None, **changes: Any
) -> BlockStored:
    """Return an event of a prompt's full blocks from `first` on; hashes count from 100."""
    blocks = range(100 + first, 100 + len(tokens) // BLOCK)
    if first:
        parent = 100 + first - 1
    fields: dict[str, Any] = {
        "block_hashes": list(blocks), "parent_block_hash": parent, "block_size": BLOCK,
        "token_ids": tokens[first * BLOCK : len(tokens) // BLOCK * BLOCK],
        "lora_id": None, "lora_name": None, "medium": "GPU",
    }  # fmt: skip
    return BlockStored(**{**fields, **changes})


def removed(*blocks: int) -> BlockRemoved:
    return BlockRemoved(block_hashes=list(blocks), medium="GPU")


@given(tokens=st.lists(st.integers(0, 50_000), min_size=2 * BLOCK, max_size=40), data=st.data())
def test_blocks_are_named_as_the_router_names_them(tokens: list[int], data: Any) -> None:
    names = PrefixNames()
    cut = data.draw(st.integers(1, len(tokens) // BLOCK))
    first = names.change([stored(tokens[: cut * BLOCK])])
    rest = names.change([stored(tokens, first=cut)])
    hashes = prefix_hashes(tokens, BLOCK)
    assert tuple(first.stored + rest.stored) == hashes
    gone = names.change([removed(*range(100, 100 + len(hashes)))])
    assert tuple(gone.removed) == hashes


def test_the_last_event_of_a_block_counts() -> None:
    names = PrefixNames()
    tokens = list(range(2 * BLOCK))
    first, second = prefix_hashes(tokens, BLOCK)
    change = names.change([stored(tokens), removed(101)])
    assert (change.stored, change.removed) == ([first], [second])
    cleared = names.change([removed(100), AllBlocksCleared(), stored(tokens)])
    assert cleared == ([first, second], [], True)


def test_a_prompt_is_cached_while_blocks_or_a_held_cache_have_it() -> None:
    names = PrefixNames()
    tokens = list(range(2 * BLOCK))
    hashes = list(prefix_hashes(tokens, BLOCK))
    held = stored(tokens, medium=HELD_MEDIUM)
    dropped = BlockRemoved(block_hashes=[100, 101], medium=HELD_MEDIUM)
    assert names.change([stored(tokens)]).stored == hashes
    assert names.change([held, held]).stored == hashes
    assert names.change([removed(100, 101)]).removed == []
    assert names.change([dropped]).removed == []
    assert names.change([dropped]).removed == hashes
    assert names.change([held]).stored == hashes
    assert names.change([dropped]).removed == hashes
    # The follower never saw this cache being stored.
    assert names.change([dropped]) == ([], [], False)
    assert names.change([held]).stored == hashes


def test_blocks_of_unknown_parents_and_images_are_left_out() -> None:
    names = PrefixNames()
    tokens = list(range(2 * BLOCK))
    image = ("an image", 3)
    events = [
        stored(tokens, first=1),
        stored(tokens, extra_keys=[(image,), None]),
        stored(tokens, extra_keys=[None, (image,)]),
        stored(tokens, extra_keys=[("salt", b"embeddings"), None]),
        removed(100, 101),
    ]
    assert not any(names.change(events))


@pytest.mark.parametrize("adapter", [None, "adapter"])
@pytest.mark.parametrize("salt", [None, "salt"])
def test_adapters_and_salts_begin_other_chains(adapter: str | None, salt: str | None) -> None:
    names = PrefixNames()
    tokens = list(range(3 * BLOCK))
    of_adapter = () if adapter is None else (adapter,)
    of_salt = () if salt is None else (salt,)
    keys = [(*of_adapter, *of_salt) or None, of_adapter or None]
    first = stored(tokens[: 2 * BLOCK], lora_name=adapter, extra_keys=keys)
    rest = stored(tokens, first=2, lora_name=adapter, extra_keys=[of_adapter or None])
    change = names.change([first, rest])
    assert tuple(change.stored) == prefix_hashes(tokens, BLOCK, seed_hash(salt, adapter))


def batch(number: int, *events: Any) -> Batch:
    return Batch(number, msgspec.msgpack.encode(KVEventBatch(ts=0.0, events=list(events))))


class Publisher:
    """Repeats `kept`, or does not answer; the test hands the follower what arrives."""

    def __init__(self) -> None:
        self.kept: list[Batch] | None = []
        self.asked: list[int] = []
        self._follower = CacheFollower(self._replay)

    async def _replay(self, start: int) -> list[Batch]:
        self.asked.append(start)
        if self.kept is None:
            raise TimeoutError
        return [one for one in self.kept if one.number >= start]

    async def known(self, *batches: Batch) -> set[int]:
        """Return the blocks that a router counts as cached after these batches."""
        blocks: set[int] = set()
        for one in batches:
            for stored, removed, cleared in await self._follower.take(one):
                blocks = set() if cleared else blocks
                blocks = (blocks | set(stored)) - set(removed)
        return blocks


TOKENS = list(range(2 * BLOCK))
FIRST, SECOND = prefix_hashes(TOKENS, BLOCK)
BATCHES = [batch(0, stored(TOKENS)), batch(1, removed(101)), batch(2, stored(TOKENS, first=1))]


@pytest.fixture
def publisher() -> Publisher:
    return Publisher()


async def test_without_a_gap_nothing_is_asked_for(publisher: Publisher) -> None:
    assert await publisher.known(*BATCHES) == {FIRST, SECOND}
    assert publisher.asked == []


@pytest.mark.parametrize("lost", [[0], [1], [0, 1]])
async def test_lost_batches_are_asked_for_again(publisher: Publisher, lost: list[int]) -> None:
    # By the time of the answer it has published more than what arrives first.
    publisher.kept = BATCHES
    arriving = [one for one in BATCHES if one.number not in lost]
    assert await publisher.known(*arriving) == {FIRST, SECOND}
    assert publisher.asked == [lost[0]]


@pytest.mark.parametrize("kept", [None, [], BATCHES[2:]], ids=["silent", "empty", "too late"])
async def test_what_cannot_be_repeated_makes_it_start_over(
    publisher: Publisher, kept: list[Batch] | None
) -> None:
    publisher.kept = kept
    other = [token + 50 for token in TOKENS]
    later = batch(3, stored(other, block_hashes=[200, 201]))
    # The second block's eviction is lost, and so might be any other.
    assert await publisher.known(BATCHES[0], later) == set(prefix_hashes(other, BLOCK))


async def test_what_cannot_be_read_counts_as_lost(publisher: Publisher) -> None:
    assert await publisher.known(BATCHES[0], Batch(1, b"\xc1"), batch(2)) == set()
    assert publisher.asked == []


async def test_a_publisher_that_counts_anew_has_an_empty_cache(publisher: Publisher) -> None:
    publisher.kept = None
    assert await publisher.known(*BATCHES, batch(0, removed(999))) == set()


@pytest.fixture
def sockets() -> Iterator[EventSockets]:
    # Unix sockets allow only a short path.
    with tempfile.TemporaryDirectory(prefix="kv", dir="/tmp") as folder:
        yield EventSockets(f"ipc://{folder}/events", f"ipc://{folder}/replay")


async def published(sockets: EventSockets, last: int) -> None:
    """Wait until the publisher's thread has published a batch."""
    with zmq.asyncio.Context() as context:
        async with asyncio.timeout(60):
            while last not in [one.number for one in await replayed(context, sockets.replay, 0)]:
                pass


@pytest.mark.parametrize(("kept", "is_cleared"), [(100, False), (1, True)])
async def test_a_follower_that_comes_late_catches_up_with_vllm_s_publisher(
    sockets: EventSockets, kept: int, is_cleared: bool
) -> None:
    publisher = ZmqEventPublisher(0, sockets.events, sockets.replay, buffer_steps=kept)
    changes = cache_changes(sockets)
    try:
        for event in (stored(TOKENS), removed(101)):
            publisher.publish(KVEventBatch(ts=0.0, events=[event]))
        await published(sockets, last=1)
        first = asyncio.ensure_future(anext(changes))
        async with asyncio.timeout(60):
            # Events published before the subscription arrives are lost, too.
            while not first.done():
                publisher.publish(KVEventBatch(ts=0.0, events=[removed(999)]))
                await asyncio.wait([first], timeout=0.05)
            change = await first
        assert change.cleared == is_cleared
        assert change.stored == ([] if is_cleared else [FIRST, SECOND])
    finally:
        await changes.aclose()
        publisher.shutdown()
