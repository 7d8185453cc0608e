"""Mistakes planted in the text of the CUDA kernels: the cases of their operations must fail on each."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch

from nemo_engine.ops import ALL_OPS
from tests.emulation.library import ROOT, build, emulated, open_library, watched, why_not
from tests.ops.proofs import prove
from tests.ops.test_ops import site

pytestmark = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))

# File, what stands there once, what is planted, the operation, how many of its first cases must hold it.
MISTAKES = {
    "a key of the next page": (
        "attention/decode.cuh", "(key >> p.page_shift)", "((key + 16) >> p.page_shift)", "paged_attention", 4
    ),
    "another row of a fragment": (
        "attention/decode.cuh", "row = first_key + (matrix & 1) * 8 +", "row = first_key + (matrix >> 1) * 8 +",
        "paged_attention", 4,
    ),
    "copies not waited for": (
        "attention/decode.cuh", "copy_async_wait<DECODE_STAGES - 2>()", "copy_async_wait<DECODE_STAGES - 1>()",
        "paged_attention", 4,
    ),
    "no barrier": (
        "common/rows.cuh", "block_sync();\n    return warp_sum", "return warp_sum", "rms_norm", 6
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of all that the emulated library is built from."""
    path = tmp_path_factory.mktemp("tree")
    shutil.copy(ROOT / "CMakeLists.txt", path)
    shutil.copytree(ROOT / "csrc", path / "csrc")
    shutil.copytree(ROOT / "tests" / "emulation", path / "tests" / "emulation")
    return path


def failures(library: Path, name: str, count: int) -> list[str]:
    """The operation's first cases that do not hold with the kernels of ``library``."""
    op = next(op for op in ALL_OPS if op.name == name)
    impl = next(impl for impl in op.impls if impl.name == "cuda")
    failed = []
    with emulated(open_library(library)) as module:
        cases = (case for case in op.cases() if impl.supports(site(torch.bfloat16, **case.site)) is None)
        for case in islice((case for case in cases if case.make(torch.bfloat16)[0].numel() > 64), count):
            try:
                prove(op, watched(module, op, impl.load()), case, torch.bfloat16)
            except (AssertionError, RuntimeError) as error:
                failed.append(f"{case.name}: {error}")
    return failed


def failures_apart(tree: Path, op: str, count: int) -> list[str]:
    """The same of the kernels in ``tree``, in a process of its own: an extension module is loaded once in each."""
    library = build(tree / "build", "-DNEMO_FAMILIES=attention;norm", source=tree)
    code = f"import json; from tests.test_planted_mistakes import *; print(json.dumps(failures(Path({str(library)!r}), {op!r}, {count})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    failed: list[str] = json.loads(run.stdout)
    return failed


def test_without_a_mistake_the_cases_hold(tree: Path) -> None:
    for op, count in {(op, count) for _, _, _, op, count in MISTAKES.values()}:
        assert failures_apart(tree, op, count) == []


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_caught(tree: Path, mistake: str) -> None:
    file, right, wrong, op, count = MISTAKES[mistake]
    path = tree / "csrc" / file
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, wrong))
    try:
        assert failures_apart(tree, op, count)
    finally:
        path.write_text(text)
