"""The operations as Triton kernels: importing a module registers its paths for tensors on CUDA.

No wrapper here waits for the device: numbers that depend on data stay there, and shapes follow from
bounds that the host has.
"""
