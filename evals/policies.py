"""What is measured, unless something else is asked for."""

POLICIES = (
    "snapkv", "ada_snapkv", "pyramidkv", "ada_pyramidkv", "kv_compress", "critical_ada_snapkv",
    "defensive", "expected_attention", "ada_expected_attention", "streaming_llm",
)  # fmt: skip
