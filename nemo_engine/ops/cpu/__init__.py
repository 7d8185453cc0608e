"""What is made for CPUs: attention over torch's SDPA, the kernels of csrc/cpu, and products over packed weights."""
