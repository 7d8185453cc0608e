"""schemathesis over the server's own OpenAPI document finds no answer of status 500, and none that the document does not have."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.server.live import LiveServer


def test_no_generated_request_breaks_the_server(live: LiveServer, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{live.url}/openapi.json", f"--url={live.url}",
        "--exclude-path=/monitor/stream", "--max-examples=12", "--generation-database=none", "--phases=examples,coverage,fuzzing",
        "--workers=1", "--checks=not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        "--request-timeout=20", "--seed=1", "--no-color",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
