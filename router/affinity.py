"""The prefix blocks that each replica has probably cached."""

from collections import OrderedDict
from collections.abc import Sequence


class PrefixAffinity:
    """Prefix blocks by replica, least recently used first. A replica may have evicted some."""

    def __init__(self) -> None:
        self._blocks: dict[str, OrderedDict[int, None]] = {}
        self._holders: dict[int, set[str]] = {}

    def note(self, replica_id: str, hashes: Sequence[int], capacity_blocks: int) -> None:
        """Remember prefix blocks that the replica got, `capacity_blocks` in all at most."""
        blocks = self._blocks.setdefault(replica_id, OrderedDict())
        for block in hashes:
            blocks[block] = None
            blocks.move_to_end(block)
            self._holders.setdefault(block, set()).add(replica_id)
        while len(blocks) > capacity_blocks:
            self._drop_holder(blocks.popitem(last=False)[0], replica_id)
        if not blocks:
            del self._blocks[replica_id]

    def discard(self, replica_id: str, hashes: Sequence[int]) -> None:
        """Forget blocks that the replica has evicted."""
        blocks = self._blocks.get(replica_id)
        for block in hashes:
            if blocks and block in blocks:
                del blocks[block]
                self._drop_holder(block, replica_id)
        if not blocks:
            self._blocks.pop(replica_id, None)

    def cached_blocks(self, replica_id: str, hashes: Sequence[int]) -> int:
        """Count the leading blocks of a prompt that the replica probably has."""
        blocks = self._blocks.get(replica_id)
        if not blocks:
            return 0
        count = 0
        for block in hashes:
            if block not in blocks:
                break
            count += 1
        return count

    def holders(self, hashes: Sequence[int]) -> set[str]:
        """Return the replicas that hold the most leading blocks of a prompt."""
        for block in reversed(hashes):
            if holders := self._holders.get(block):
                return holders
        return set()

    @property
    def replica_ids(self) -> list[str]:
        """Replicas with remembered blocks."""
        return list(self._blocks)

    def forget(self, replica_id: str) -> None:
        for block in self._blocks.pop(replica_id, ()):
            self._drop_holder(block, replica_id)

    def _drop_holder(self, block: int, replica_id: str) -> None:
        holders = self._holders[block]
        holders.discard(replica_id)
        if not holders:
            del self._holders[block]


def check_affinity(affinity: PrefixAffinity) -> None:
    """Assert that blocks by replica and replicas by block are the same relation."""
    by_replica = {(replica, b) for replica, blocks in affinity._blocks.items() for b in blocks}
    by_block = {(replica, b) for b, holders in affinity._holders.items() for replica in holders}
    assert by_replica == by_block, "blocks and holders differ"
    assert all(affinity._holders.values()), "a block without holders is remembered"
    assert all(affinity._blocks.values()), "a replica without blocks is remembered"
