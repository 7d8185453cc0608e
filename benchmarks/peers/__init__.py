"""The engines that ours is measured against, each in a process of its own, under the Python that has it."""

from nemo_engine.benchmarks.peers.process import PEERS, PeerError, PeerProcess, WorkerProcess, why_missing

__all__ = ["PEERS", "PeerError", "PeerProcess", "WorkerProcess", "why_missing"]
