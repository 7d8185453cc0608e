"""Sizes and speeds on paper, without a GPU and without torch: memory plans, rooflines, and what a machine can be
expected to serve.
"""
