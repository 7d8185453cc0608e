"""Engines that fail as told, and this machine's ceilings, which are measured once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.benchmarks.peers import PEERS
from nemo_engine.benchmarks.peers.process import PeerKind

_MEASURED: dict[str, Any] = {}


@pytest.fixture(autouse=True)
def ceilings_are_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A benchmark in this process measures the device's ceilings only if none has yet: it takes seconds each time."""
    from nemo_engine.benchmarks import timing

    measure = timing.measure_ceilings

    def once(timer: Any, device: Any) -> Any:
        if device.type not in _MEASURED:
            _MEASURED[device.type] = measure(timer, device)
        return _MEASURED[device.type]

    monkeypatch.setattr(timing, "measure_ceilings", once)


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
