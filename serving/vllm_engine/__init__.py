"""vLLM inside a replica: the only files of `serving` that import vLLM."""
