"""Adapters of the Triton kernels whose arguments are not those of their operations.

The others are named in the tables as they are.
"""
