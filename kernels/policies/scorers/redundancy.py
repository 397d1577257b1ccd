from dataclasses import dataclass

import torch
from torch import Tensor

from adakv_serve.kernels.paging.entries import Entries, one_head, parts
from adakv_serve.kernels.policies.attention import observed_attention, pool
from adakv_serve.kernels.policies.observation import Observation

# Elements of a part of the similarity matrix; several tensors have its size.
_ELEMENTS = 1 << 21


@dataclass(frozen=True)
class RedundancyScorer:
    """R-KV (2505.24133): attention of the window minus redundancy.

    Redundancy is the softmax over the mean cosine similarity of a key with the other keys of its
    head. For each key, the most recent of the keys similar to it count as dissimilar, so that the
    newest of a group stays. The method is made for answers that repeat themselves; of a long prompt
    only the last `compared_tokens` keys are compared with all.

    importance_share: weight of attention; redundancy has the rest.
    least_similarity: cosine above which two keys are similar.
    spared_share: number of recent similar keys that count as dissimilar, as a share of all entries.
    compared_tokens: keys that are compared with all others.
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
        # One head at a time: the similarity of its keys is a matrix.
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
        """Return redundancy [H, m] of unit keys [H, m, D]; it sums to one for each head."""
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
    """Return keys [H, n, D] float32 scaled to length one."""
    directions = torch.empty(keys.shape, dtype=torch.float32, device=keys.device)
    for first, part in parts(keys):
        some = part.float()
        directions[:, first : first + some.shape[1]] = torch.nn.functional.normalize(some, dim=-1)
    return directions
