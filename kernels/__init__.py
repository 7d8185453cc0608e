"""Triton kernels, one file per operation. They know torch and triton, and nothing of the engine."""
