"""Which replica has probably cached which prefix: what was sent there, least recently used out."""

from collections import OrderedDict
from collections.abc import Sequence


class PrefixAffinity:
    """Prefix blocks by replica. Approximate: the replica may have evicted them since."""

    def __init__(self) -> None:
        self._blocks: dict[str, OrderedDict[int, None]] = {}

    def note(self, replica_id: str, hashes: Sequence[int], capacity_blocks: int) -> None:
        """A prompt with these prefix blocks was sent to the replica, which has room for so many."""
        blocks = self._blocks.setdefault(replica_id, OrderedDict())
        for block in hashes:
            blocks[block] = None
            blocks.move_to_end(block)
        while len(blocks) > capacity_blocks:
            blocks.popitem(last=False)

    def cached_blocks(self, replica_id: str, hashes: Sequence[int]) -> int:
        """How many of a prompt's leading blocks the replica probably has."""
        blocks = self._blocks.get(replica_id)
        if not blocks:
            return 0
        count = 0
        for block in hashes:
            if block not in blocks:
                break
            count += 1
        return count

    def forget(self, replica_id: str) -> None:
        self._blocks.pop(replica_id, None)
