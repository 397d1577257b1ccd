"""Names, descriptions and buckets of compression's metrics, on vLLM's and on Ray's endpoint."""

REQUESTS = ("adakv_requests", "Completed prompts by policy and reason not to compress")
ORIGINAL_TOKENS = ("adakv_original_tokens", "Prompt tokens before compression")
KEPT_TOKENS = ("adakv_kept_tokens", "Mean entries kept of them")
FREED_BLOCKS = ("adakv_freed_blocks", "Blocks that compression gave back")
DECODE_EVICTIONS = ("adakv_decode_evictions", "Evictions while decoding, of long answers")
SELECTION_FAILURES = (
    "adakv_selection_failures",
    "Requests that kept recent entries because their policy raised an error",
)
KEPT_SHARE = ("adakv_kept_share", "Share of a compressed prompt that was kept")
BLOCKS_AFTER = ("adakv_blocks_after", "Blocks held after compression")
SHARE_BUCKETS = [0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0]
BLOCK_BUCKETS = [float(2**power) for power in range(13)]
