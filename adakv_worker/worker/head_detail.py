"""What each head of a request keeps of its prompt, for requests that ask for it."""

import torch
from torch import Tensor

from adakv_worker.messages import DETAIL_TOKENS, Compress, HeadDetail
from adakv_worker.worker.ranks import Ranks


def lists_tokens(command: Compress) -> bool:
    """Return whether a compression's detail has its tokens, for which it records its selection."""
    return command.detail and command.prompt_tokens <= DETAIL_TOKENS


def head_detail(lens: Tensor, positions: Tensor | None) -> HeadDetail:
    """Return the detail of a compressed request.

    Args:
        lens: [L, H], entries of its heads.
        positions: [L, H, n] bool, the prompt's entries that they keep; None if not recorded.
    """
    keeping = None
    if positions is not None and positions.shape[-1] <= DETAIL_TOKENS:
        keeping = positions.sum(dim=(0, 1)).tolist()
    return HeadDetail(lens.tolist(), keeping)


def over_ranks(detail: HeadDetail, ranks: Ranks) -> HeadDetail:
    """Return the detail of all tensor-parallel ranks' heads; all call this in the same step."""
    kept = torch.cat(ranks.each(torch.tensor(detail.kept)), dim=1)
    keeping = None
    if detail.keeping is not None:
        keeping = torch.stack(ranks.each(torch.tensor(detail.keeping))).sum(dim=0).tolist()
    return HeadDetail(kept.tolist(), keeping)
