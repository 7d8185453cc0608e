"""The start-up log: rows in order, bytes that become known on the way, an aligned table."""

from __future__ import annotations

import logging

import pytest

from nemo_engine.startup_log import StartupLog


def test_rows_and_table(caplog: pytest.LogCaptureFixture) -> None:
    startup_log = StartupLog()
    assert startup_log.format() == ""
    with startup_log.stage("load weights") as stage:
        stage.num_bytes = 3 << 29
    with startup_log.stage("allocate KV cache", num_bytes=512):
        pass
    assert [(row.name, row.num_bytes) for row in startup_log.rows] == [
        ("load weights", 3 << 29),
        ("allocate KV cache", 512),
    ]
    assert all(row.seconds >= 0 for row in startup_log.rows)
    lines = startup_log.format().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["start-up", "load weights", "allocate KV cache", "total"]
    assert lines[1].endswith("1.50 GiB") and lines[2].endswith("512 B")
    assert len({len(line) for line in lines[:3]}) == 1  # aligned
    with caplog.at_level(logging.INFO, "nemo_engine"):
        startup_log.log()
    assert caplog.records[0].getMessage() == startup_log.format()


def test_a_stage_that_fails_leaves_no_row() -> None:
    startup_log = StartupLog()
    with pytest.raises(RuntimeError), startup_log.stage("open checkpoint"):
        raise RuntimeError
    assert startup_log.rows == ()
