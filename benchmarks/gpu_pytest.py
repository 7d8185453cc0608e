"""A plugin for pytest on a GPU: every test's outcome is in the results file at once, no test runs longer than its
limit, and a test that spoils the device in its process spoils no other.

GPU_RESULTS names the file, GPU_TEST_SECONDS the limit; with GPU_RESUME set, what passed before does not run again. A
worker whose device is spoilt ends, and pytest-xdist starts another.
"""

from __future__ import annotations

import faulthandler
import os
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.benchmarks.provenance import append_record, read_records

_LOST_MOST = 3  # tests of one implementation that may hang or spoil the device; the others of it are not run
_ID = re.compile(r"\[(?P<op>\w+)-(?P<impl>\w+)-")


def of_test(nodeid: str) -> dict[str, str]:
    """Operation and implementation that a test is about, as far as its name says."""
    match = _ID.search(nodeid)
    return match.groupdict() if match else {}


class Outcomes:
    """In the process that reports: a line for each test."""

    def __init__(self, results: Path, lost: Path) -> None:
        self.results = results
        self.lost = lost  # a line for each test that ended its process
        self.counts: dict[str, int] = {}

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed" and report.when in ("setup", "???"):
            self.counts[report.outcome] = self.counts.get(report.outcome, 0) + 1
            record = {
                "benchmark": "gpu_tests", "stage": "tests", "key": f"test {report.nodeid}", "status": report.outcome,
                "seconds": round(report.duration, 3), **of_test(report.nodeid),
            }  # fmt: skip
            if report.outcome != "passed":
                text = str(report.longrepr).strip().splitlines() or [""]
                errors = [line for line in text if line.startswith("E ")] or text[-1:]
                record["error"] = errors[0][:300]
                if "worker" in text[0] and "crashed" in text[0]:
                    record["status"] = "crashed"
                    with self.lost.open("a") as file:
                        file.write(" ".join(of_test(report.nodeid).values()) + "\n")
            append_record(self.results, record)

    def pytest_sessionfinish(self, session: Any, exitstatus: int) -> None:
        if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and os.environ.get("GPU_RESUME"):
            session.exitstatus = exitstatus = 0  # all had passed before
        record = {"benchmark": "gpu", "stage": "tests", "key": "tests end", "status": "ok", "counts": self.counts}
        append_record(self.results, record | {"exit": int(exitstatus)})


class Guard:
    """In the process that tests: a limit for each test, and an end where the device is spoilt."""

    def __init__(self, results: Path, seconds: float, lost: Path) -> None:
        self.results = results
        self.seconds = seconds
        self.lost = lost

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if os.environ.get("GPU_RESUME"):
            passed = {record.get("key") for record in read_records(self.results) if record.get("status") == "passed"}
            items[:] = [item for item in items if f"test {item.nodeid}" not in passed]

    def pytest_runtest_setup(self, item: Any) -> None:
        name = of_test(item.nodeid)
        if name and self.lost.exists():
            times = self.lost.read_text().splitlines().count(f"{name['op']} {name['impl']}")
            if times >= _LOST_MOST:
                pytest.skip(f"{times} other tests of this implementation ended their processes")

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        # A kernel that hangs holds the interpreter in C: only the end of the process ends it.
        faulthandler.dump_traceback_later(self.seconds, exit=True, file=sys.__stderr__)
        try:
            return (yield)  # type: ignore[misc]
        finally:
            faulthandler.cancel_dump_traceback_later()

    def pytest_runtest_teardown(self, item: Any) -> None:
        torch = sys.modules.get("torch")
        if torch is None or not (torch.cuda.is_available() and torch.cuda.is_initialized()):
            return
        try:
            torch.zeros(1, device="cuda").item()
        except RuntimeError:
            time.sleep(0.2)  # what the test reported is on its way
            os._exit(1)


def pytest_configure(config: Any) -> None:
    results, lost = Path(os.environ["GPU_RESULTS"]), Path(os.environ["GPU_SCRATCH"]) / "lost"
    is_worker = hasattr(config, "workerinput")
    if not is_worker:
        config.pluginmanager.register(Outcomes(results, lost))
    if is_worker or not config.getoption("numprocesses", None):
        config.pluginmanager.register(Guard(results, float(os.environ["GPU_TEST_SECONDS"]), lost))
