"""Attention over compressed caches, with vLLM's own kernels."""
