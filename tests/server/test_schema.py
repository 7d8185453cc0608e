"""schemathesis over the server's own OpenAPI document, in all its phases: what the document forbids is refused, every answer is one that it
has, and none is of status 500. Rules between fields are not in the document, so what it allows may be refused.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.server.live import LiveServer


def test_the_server_does_what_its_document_says(live: LiveServer, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{live.url}/openapi.json", f"--url={live.url}", "--max-examples=5",
        "--generation-database=none", "--phases=examples,coverage,fuzzing,stateful", "--workers=1", "--checks=all",
        "--exclude-checks=positive_data_acceptance", "--max-response-time=60",
        "--request-timeout=60", "--seed=1", "--no-color",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
