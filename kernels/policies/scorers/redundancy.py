from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.paging.entries import Entries, one_head, parts
from kernels.policies.attention import observed_attention, pool
from kernels.policies.observation import Observation

# Numbers of a part of the similarity matrix: there are several tensors of its size.
_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class RedundancyScorer:
    """R-KV (2505.24133): attention of the window, less what other entries say as well.

    An entry is redundant by the mean cosine similarity of its key with all others of its head, as a
    softmax over the entries. Of those that are similar to a key, the most recent ones are not
    counted against themselves, so that the newest of a group stays. Made for answers that repeat
    themselves: of a long prompt only the last `compared_tokens` keys are compared with all.

    importance_share: weight of attention; the rest is redundancy's.
    least_similarity: from which on two keys are similar.
    spared_share: of all entries, how many of the most recent similar ones are spared for each key.
    """

    window_tokens: int = 32
    kernel_size: int = 7
    importance_share: float = 0.1
    least_similarity: float = 0.5
    spared_share: float = 0.1
    compared_tokens: int = 4096

    @property
    def query_span_tokens(self) -> int:
        return self.window_tokens

    def score(self, observation: Observation) -> Tensor:
        attention = observed_attention(observation, self.window_tokens, "max")
        importance = pool(attention, self.kernel_size, "max")
        # One head's keys at a time: all are compared with all.
        redundancy = torch.cat(
            [
                self._redundancy(
                    _directions(one_head(observation.keys, head))[:, : -self.window_tokens]
                )
                for head in range(observation.num_kv_heads)
            ]
        )
        return self.importance_share * importance - (1 - self.importance_share) * redundancy

    def _redundancy(self, directions: Tensor) -> Tensor:
        """[H, m] of keys' directions [H, m, D]; sums to one for each head."""
        heads, m, _ = directions.shape
        spared = int(self.spared_share * m)
        sums = directions.new_zeros((heads, m))
        first, rows_at_once = max(0, m - self.compared_tokens), max(1, _ELEMENTS // (heads * m))
        for start in range(first, m, rows_at_once):
            rows = directions[:, start : start + rows_at_once]
            similarity = rows @ directions.transpose(1, 2)
            own = torch.arange(rows.shape[1], device=directions.device)
            similarity[:, own, start + own] = 0.0
            similar = similarity > self.least_similarity
            from_the_end = similar.flip(-1).cumsum(dim=-1, dtype=torch.int32).flip(-1)
            similar &= from_the_end <= spared
            sums += similarity.masked_fill_(similar, 0.0).sum(dim=1)
        return (sums / (m - first)).softmax(dim=-1)


def _directions(keys: Entries) -> Tensor:
    """Return keys [H, n, D] of length one, float32."""
    directions = torch.empty(keys.shape, dtype=torch.float32, device=keys.device)
    for first, part in parts(keys):
        some = part.float()
        directions[:, first : first + some.shape[1]] = torch.nn.functional.normalize(some, dim=-1)
    return directions
