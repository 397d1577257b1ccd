"""The operations as Triton kernels: importing a module registers its paths for tensors on CUDA.

No wrapper here waits for the device: what depends on data stays on it, and shapes follow from
bounds that the host knows.
"""
