"""What each head keeps, for whoever asks for it."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.distributed import FileStore, ProcessGroupGloo

from adakv_worker.messages import DETAIL_TOKENS, HeadDetail
from adakv_worker.worker.head_detail import head_detail, over_ranks
from adakv_worker.worker.ranks import Ranks


def test_a_detail_counts_the_heads_that_keep_each_token() -> None:
    positions = torch.tensor([[[1, 0, 1], [1, 1, 1]], [[0, 0, 1], [1, 0, 1]]]).bool()
    detail = head_detail(positions.sum(dim=-1), positions)
    assert detail == HeadDetail([[2, 3], [1, 2]], [3, 1, 4])


def test_the_detail_of_a_longer_prompt_has_no_tokens() -> None:
    positions = torch.ones((1, 1, DETAIL_TOKENS + 1), dtype=torch.bool)
    assert head_detail(positions.sum(dim=-1), positions).keeping is None
    assert head_detail(positions.sum(dim=-1), None).keeping is None


def test_a_detail_has_the_heads_of_all_ranks(tmp_path: Path) -> None:
    own = [HeadDetail([[2, 3], [1, 2]], [3, 1, 4]), HeadDetail([[5, 6], [7, 8]], [0, 4, 4])]

    def of_rank(rank: int) -> HeadDetail:
        group = ProcessGroupGloo(FileStore(str(tmp_path / "store"), 2), rank, 2)
        return over_ranks(own[rank], Ranks(rank, 2, group))

    with ThreadPoolExecutor(2) as pool:
        details = list(pool.map(of_rank, range(2)))
    assert details == [HeadDetail([[2, 3, 5, 6], [1, 2, 7, 8]], [3, 5, 8])] * 2
