"""The start-up ledger: rows in order, bytes that become known on the way, an aligned table."""

from __future__ import annotations

import logging

import pytest

from nemo_engine.ledger import Ledger


def test_rows_and_table(caplog: pytest.LogCaptureFixture) -> None:
    ledger = Ledger()
    assert ledger.format() == ""
    with ledger.stage("load weights") as stage:
        stage.num_bytes = 3 << 29
    with ledger.stage("allocate KV cache", num_bytes=512):
        pass
    assert [(row.name, row.num_bytes) for row in ledger.rows] == [("load weights", 3 << 29), ("allocate KV cache", 512)]
    assert all(row.seconds >= 0 for row in ledger.rows)
    lines = ledger.format().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["start-up", "load weights", "allocate KV cache", "total"]
    assert lines[1].endswith("1.50 GiB") and lines[2].endswith("512 B")
    assert len({len(line) for line in lines[:3]}) == 1  # aligned
    with caplog.at_level(logging.INFO, "nemo_engine"):
        ledger.log()
    assert caplog.records[0].getMessage() == ledger.format()


def test_a_stage_that_fails_leaves_no_row() -> None:
    ledger = Ledger()
    with pytest.raises(RuntimeError), ledger.stage("open checkpoint"):
        raise RuntimeError
    assert ledger.rows == ()
