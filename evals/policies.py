"""Policies that are measured by default."""

POLICIES = (
    "snapkv", "ada_snapkv", "pyramidkv", "ada_pyramidkv", "kv_compress", "critical_ada_snapkv",
    "critical_kv_compress", "defensive", "expected_attention", "ada_expected_attention",
    "streaming_llm",
)  # fmt: skip
# Measured with evictions while decoding.
EVICTING_POLICIES = ("snapkv", "ada_snapkv", "kv_compress", "r_kv", "ada_r_kv", "streaming_llm")

# Policies with adaptive heads, and the same policy with uniform heads.
TWINS = {
    "ada_snapkv": "snapkv",
    "ada_pyramidkv": "pyramidkv",
    "ada_expected_attention": "expected_attention",
    "ada_r_kv": "r_kv",
}
