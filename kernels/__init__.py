"""Pure tensor operations and block arithmetic of paged per-head KV compression.

`import kernels` imports no torch, because `router` uses the block arithmetic without it.
"""
