"""Engines that fail as told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nemo_engine.benchmarks.peers import PEERS
from nemo_engine.benchmarks.peers.process import PeerKind


@pytest.fixture
def fake_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fake``, ``fake2`` to ``fake4`` and ``other``, by ``fake_peer.py``, and ``absent``, whose package is not
    installed.
    """
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])]))
    for name in ("fake", "fake2", "fake3", "fake4", "other", "absent"):
        package = "no_such_package" if name == "absent" else "json"
        monkeypatch.setitem(PEERS, name, PeerKind("fake_peer", package, "a fake", "most"))
