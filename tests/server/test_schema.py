"""schemathesis over the server's own OpenAPI document, in all its phases and with all its checks: what the document
forbids is refused, what it allows is accepted, every answer is one that it has, and none is of status 500.
``schemathesis_hooks`` has the rules that no schema can say.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from nemo_engine import AsyncEngine
from nemo_engine.server.openapi import ids_below
from tests.server.live import LiveServer

FOLDER = Path(__file__).parent


def test_the_server_does_what_its_document_says(engine: AsyncEngine, tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text("")  # so that no file further up is read
    hooks = {"SCHEMATHESIS_HOOKS": "schemathesis_hooks", "PYTHONPATH": str(FOLDER)}
    with LiveServer(engine, max_completion_tokens=4) as server:
        command = [
            sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", f"--url={server.url}",
            "--max-examples=5", "--generation-database=none", "--phases=examples,coverage,fuzzing,stateful",
            "--workers=1", "--checks=all", "--max-response-time=60", "--request-timeout=600", "--seed=1", "--no-shrink",
            "--no-color",
        ]  # fmt: skip
        run = subprocess.run(command, capture_output=True, text=True, timeout=500, cwd=tmp_path, env=os.environ | hooks)
    assert run.returncode == 0, run.stdout[-20000:] + run.stderr[-2000:]
    assert "POST /v1/chat/completions" not in run.stdout, run.stdout[-6000:]  # nothing to say of it, not even a warning


def test_the_pattern_of_ids_below_a_limit() -> None:
    for number in (1, 2, 9, 10, 11, 97, 100, 101, 6144, 6200):
        pattern = re.compile(f"^({ids_below(number)})$")
        assert [one for one in range(number + 2000) if pattern.match(str(one))] == list(range(number))
