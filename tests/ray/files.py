"""A folder of files on Ray Data, by the example: killed half way and started again. ``make test-ray``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from nemo_engine import Engine
from tests.batch.kills import union

EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "ray_data_batch.py"
SETTINGS = {"RAY_raylet_start_wait_time_s": "180", "RAY_worker_niceness": "0"}  # of a slow machine


def test_a_folder_that_was_half_answered_is_gone_on_with(tmp_path: Path) -> None:
    source, target, alone = tmp_path / "in", tmp_path / "out", tmp_path / "alone"
    source.mkdir()
    alone.mkdir()
    for index in range(4):
        lines = [
            json.dumps({"prompt": f"def number_{index}_{line}(x):", "max_tokens": 12, "seed": line})
            for line in range(60)
        ]
        lines[7] = '{"broken": '
        (source / f"{index}.jsonl").write_text("\n".join(lines))
    command = [sys.executable, str(EXAMPLE), str(source), str(target), "--actors", "2"]
    first = subprocess.Popen(command, env=os.environ | SETTINGS, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 600
    while not any(target.glob("*.jsonl")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    time.sleep(5)  # its actors notice, and may finish the files that they have
    done = [path.name for path in target.glob("*.jsonl")]
    assert 0 < len(done) < 4, "nothing was left to do"
    second = subprocess.run(command, env=os.environ | SETTINGS, capture_output=True, text=True, timeout=900)
    assert second.returncode == 0, second.stderr[-2000:]
    assert f"4 files, {len(done)} done before" in second.stdout
    assert sorted(path.name for path in target.glob("*.jsonl")) == [f"{index}.jsonl" for index in range(4)]
    assert not list(target.glob("*.part*"))
    with Engine("nemo-tiny", device="cpu", num_kv_pages=400, max_num_seqs=8, max_model_len=1024) as engine:
        for path in source.iterdir():
            engine.batch(path, alone / path.name)
            found = union(target / path.name)
            assert found == union(alone / path.name) and sum(found.values()) == 60
    third = subprocess.run(command, env=os.environ | SETTINGS, capture_output=True, text=True, timeout=300)
    assert third.stdout.splitlines() == ["4 files, 4 done before"]
