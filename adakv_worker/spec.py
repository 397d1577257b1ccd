"""KV-cache spec of compressed layers, which vLLM's core and workers both read."""

from dataclasses import dataclass, replace
from typing import Self

from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec


@dataclass(frozen=True, kw_only=True)
class AdaKVSpec(FullAttentionSpec):
    """Full attention whose block-table rows also hold slabs, in the step that compresses.

    unsupported: (preset, reason) for each preset that cannot score the model's layers. A worker
        finds them in the loaded model, and the scheduler needs them.
    entries_of_a_page: more than a block has tokens where pages store fewer bits; None for as many.
    """

    unsupported: tuple[tuple[str, str], ...] = ()
    entries_of_a_page: int | None = None

    @property
    def page_tokens(self) -> int:
        """Entries of a page."""
        return self.entries_of_a_page or self.block_size

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        first = specs[0]
        merged = super().merge(specs)
        return replace(
            merged, unsupported=first.unsupported, entries_of_a_page=first.entries_of_a_page
        )

    def max_num_blocks_per_req(self, vllm_config: VllmConfig, max_len: int) -> int:
        # Slabs are fewer than the blocks they replace, or one more where all entries stay.
        return 2 * super().max_num_blocks_per_req(vllm_config, max_len) + 1
