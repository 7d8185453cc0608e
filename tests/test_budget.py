"""How large the package may be: lines of Python by room, and what a newcomer reads first.

A room that outgrows its budget is made smaller, or argues for more here.
"""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "nemo_engine"

# Lines of Python, docstrings and blank lines included, by the first folder (files at the top are one room).
BUDGETS = {
    ".": 2250,  # options and their checks, outputs, the wire between the halves, the plan of memory, quantize
    "batch": 985,  # files that survive a kill, a full disk and gigabytes, and pipes that are slow or never end
    "checkpoint": 2850,  # every way in which NeMo is published, and a refusal that says what to do for the rest
    "cli": 2425,  # every option has a flag, a help of one line, completion and a place in a file
    "engine": 2345,  # both engines, steps in a thread or in an event loop, and what an exception anywhere must not break
    "model": 540,  # a kind of layer is told what follows it: the activation, and the second layer of an MLP
    # 26 operations, adapters of three kinds of kernels and of two FlashAttentions, packed products and the draw of a CPU, a launcher
    # of Triton's kernels that passes its own by.
    "ops": 4210,
    "planner": 1250,  # 13 GPUs with sources, 74 published results that it is held against, and what drafts gain by width
    "ray": 180,
    # Steps of one token a row, and wide ones; fills and edits in one upload; on a GPU graphs of decodes and of prompts, and
    # on a CPU recorded steps to the next tokens, without the rows of wide ones that repeat another.
    "runner": 2365,
    "scheduler": 1420,  # speculation is two files of 270: how wide a step is, what came of it, and an account of what that lost
    "server": 6800,  # four dialects of an API, whose every limit stands in its document, and a network that means harm
    "simulator": 1975,  # a thousand replicas behind a router, which come, are lost and are given back; wide steps
    "text": 7500,  # any tokenizer, templates by strangers, JSON schemas that are kept: a third of it is schemas
    "verify": 500,
    "workload": 750,
}
MEAN_FILE = 155  # lines

READ_FIRST = (
    "nemo_engine/step.py",
    "nemo_engine/engine/engine.py",
    "nemo_engine/engine/core.py",
    "nemo_engine/scheduler/request.py",
    "nemo_engine/scheduler/scheduler.py",
    "nemo_engine/scheduler/running.py",
    "nemo_engine/scheduler/scheduled_step.py",
    "nemo_engine/runner/runner.py",
    "nemo_engine/runner/step_rows.py",
    "nemo_engine/runner/step_compute.py",
    "nemo_engine/model/nemo.py",
    "nemo_engine/ops/norm.py",
    "kernels/norm.py",
)


def lines_of(path: Path) -> int:
    return path.read_text().count("\n")


@pytest.mark.parametrize("room", BUDGETS)
def test_a_room_keeps_to_its_budget(room: str) -> None:
    files = PACKAGE.glob("*.py") if room == "." else (PACKAGE / room).rglob("*.py")
    assert sum(map(lines_of, files)) <= BUDGETS[room]


def test_every_room_has_a_budget_and_files_are_short_in_the_mean() -> None:
    files = list(PACKAGE.rglob("*.py"))
    assert {path.relative_to(PACKAGE).parts[0] for path in files if path.parent != PACKAGE} == {*BUDGETS} - {"."}
    assert sum(map(lines_of, files)) / len(files) <= MEAN_FILE


def test_what_is_read_first_is_read_in_an_afternoon() -> None:
    assert sum(lines_of(ROOT / name) for name in READ_FIRST) <= 2000
    architecture = (ROOT / "ARCHITECTURE.md").read_text()
    named = architecture[architecture.index("**To read in an afternoon**") : architecture.index("## One request")]
    assert [name for name in READ_FIRST if f"`{name.removeprefix('nemo_engine/')}`" not in named] == []
    assert architecture.count("\n") <= 150
