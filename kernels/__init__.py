"""Triton kernels and their launchers, a file an operation; `bincomm.ops` registers them for CUDA tensors."""
