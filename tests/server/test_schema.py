"""schemathesis over the server's own OpenAPI document, with all its checks in all its phases: what the document allows is taken, what it
forbids is refused, every answer is one that it has, and none is of status 500.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.server.live import LiveServer

# A request that asks for less time than it takes is in order, and is told so.
CONFIGURATION = """
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "401", "403", "404", "408", "409", "429", "5xx"]
"""


def test_the_server_does_what_its_document_says(live: LiveServer, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(CONFIGURATION)
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{live.url}/openapi.json", f"--url={live.url}", "--max-examples=5",
        "--generation-database=none", "--phases=examples,coverage,fuzzing,stateful", "--workers=1", "--checks=all",
        "--request-timeout=60", "--seed=1", "--no-color",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
