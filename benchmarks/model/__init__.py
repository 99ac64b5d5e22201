"""What the kernels' machine code would take on a GPU, without one."""
