"""Sizes and speeds on paper, without a GPU and without torch: memory plans, rooflines, and the load that a machine can
be expected to serve.
"""
