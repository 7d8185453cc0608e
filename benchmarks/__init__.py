"""Benchmarks: of the whole engine, of servers, of single operations, and of the engines that ours is measured
against.
"""
