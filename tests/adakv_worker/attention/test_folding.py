"""What a stock kernel is told of a step without its compressed rows."""

import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from adakv_worker.attention.folding import without_first


def test_rows_of_images_move_up_with_the_rows_before_them() -> None:
    images: dict[int, list[tuple[int, int]]] = {0: [], 1: [(2, 5)], 2: []}
    starts = torch.tensor([0, 1, 7, 9], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, num_reqs=3, num_actual_tokens=9,
        seq_lens=torch.tensor([40, 6, 2], dtype=torch.int32), max_query_len=6, max_seq_len=40,
        block_table_tensor=torch.arange(6).view(3, 2), slot_mapping=torch.arange(9),
        mm_req_doc_ranges=images,
    )  # fmt: skip
    rest = without_first(common, 1, 1)
    assert rest.num_reqs == 2
    assert rest.query_start_loc.tolist() == [0, 6, 8]
    assert rest.seq_lens.tolist() == [6, 2]
    assert rest.mm_req_doc_ranges == {0: [(2, 5)], 1: []}
    assert common.mm_req_doc_ranges is images
