"""Paged Ada-KV inside unmodified vLLM: every layer and KV head keeps its own number of entries.

Import the parts from their modules; this package itself stays light, since vLLM loads its entry
points in every process.
"""
