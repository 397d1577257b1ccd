"""Pure tensor operations and block arithmetic of paged per-head KV compression.

`import kernels` imports no torch, because `router` uses the block arithmetic without it. Hugging
Face publishes a package of the same name that `transformers` probes for; the distribution's version
therefore stays outside the range that `transformers` accepts.
"""
