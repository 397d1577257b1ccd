"""What is measured, unless something else is asked for."""

POLICIES = (
    "snapkv", "ada_snapkv", "pyramidkv", "ada_pyramidkv", "kv_compress", "critical_ada_snapkv",
    "critical_kv_compress", "defensive", "expected_attention", "ada_expected_attention",
    "streaming_llm",
)  # fmt: skip
# While an answer is written.
EVICTING_POLICIES = ("snapkv", "ada_snapkv", "kv_compress", "r_kv", "ada_r_kv", "streaming_llm")

# With adaptive heads, and the same with even ones.
TWINS = {
    "ada_snapkv": "snapkv",
    "ada_pyramidkv": "pyramidkv",
    "ada_expected_attention": "expected_attention",
    "ada_r_kv": "r_kv",
}
