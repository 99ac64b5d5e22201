"""Triton kernels and their launchers, one file per operation; `bincomm.ops` registers them for CUDA."""
