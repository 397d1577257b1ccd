"""Pure tensor operations and block arithmetic of paged per-head KV compression.

This package must import without torch: `router` uses its plain-Python block arithmetic. Its name
is also that of a Hugging Face package which `transformers` probes for, so it stays free of eager
imports, and the distribution's version stays outside the range that `transformers` accepts.
"""
