"""An engine's KV events, named as the router names prefix blocks."""

from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from vllm.distributed.kv_events import AllBlocksCleared, BlockRemoved, BlockStored

from adakv_worker.kv_events import PrefixNames
from router.footprint import prefix_hashes

BLOCK = 4


def stored(
    tokens: list[int], first: int = 0, parent: int | None = None, **changes: Any
) -> BlockStored:
    """Full blocks of a prompt from block `first` on; the engine's hashes count from 100."""
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


def test_the_last_word_on_a_block_counts() -> None:
    names = PrefixNames()
    tokens = list(range(2 * BLOCK))
    first, second = prefix_hashes(tokens, BLOCK)
    change = names.change([stored(tokens), removed(101)])
    assert (change.stored, change.removed) == ([first], [second])
    cleared = names.change([removed(100), AllBlocksCleared(), stored(tokens)])
    assert cleared == ([first, second], [], True)


def test_blocks_of_unknown_parents_adapters_and_salts_are_left_out() -> None:
    names = PrefixNames()
    tokens = list(range(2 * BLOCK))
    events = [
        stored(tokens, first=1),
        stored(tokens, lora_name="adapter"),
        stored(tokens, extra_keys=[("salt",), None]),
        removed(100, 101),
    ]
    assert not any(names.change(events))
