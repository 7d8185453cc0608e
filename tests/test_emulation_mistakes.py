"""The emulation of a GPU on which the CUDA kernels are proven: what it says of mistakes in small kernels of its own."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.emulation.library import build, open_library
from tests.test_emulation import matrix_of, small_integers, swizzled

pytestmark = pytest.mark.emulated


@pytest.fixture
def checks(emulated_library: Any) -> Any:
    emulated_library.emulator.seed(0)
    return emulated_library.checks


MISTAKES = """NONE NO_BARRIER NO_COPY_WAIT NO_PHASE_WAIT NO_PROXY_FENCE NO_PRODUCT_WAIT NO_PRODUCT_FENCE PAST_THE_END MISALIGNED
NOT_WRITTEN PAST_SHARED NO_DEPENDENCY_WAIT READ_TOO_EARLY DEADLOCK UNEQUAL_COUNTS LANES_APART WRONG_LANE TOO_MANY_ARRIVALS
NO_PHASE_BARRIER WARP_MISSES_BARRIER OVERWRITTEN_EARLY FENCE_BY_ONE TOO_MANY_BYTES TOO_MANY_REGISTERS
REGISTERS_TAKEN_BY_LESS""".split()


RACE = r"race in shared memory: thread \d+ (reads|writes) offset \d+, which thread \d+ (has written|reads) and nothing orders the two, in rotate, block"


def rotate(library: Any, mistake: str, way: int, seed: int = 0, threads: int = 128) -> bool:
    """Whether the result is right."""
    blocks = 3
    library.emulator.seed(seed)
    x, y = torch.randn(blocks, threads), torch.full((blocks, threads), torch.nan)
    try:
        for tensor in (x, y):
            library.emulator.allow(tensor.data_ptr(), tensor.nbytes)
        library.checks.rotate(y.data_ptr(), x.data_ptr(), blocks, threads, MISTAKES.index(mistake), way)
    finally:
        library.emulator.forget()
    return y.equal(x.roll(-1, 1))


@pytest.mark.parametrize("way", [0, 1, 2])
def test_what_is_right_stays_right(emulated_library: Any, way: int) -> None:
    assert all(rotate(emulated_library, "NONE", way, seed) for seed in range(10))


@pytest.mark.parametrize("mistake", ["NOT_WRITTEN", "WRONG_LANE"])
def test_mistakes_that_change_the_result(emulated_library: Any, mistake: str) -> None:
    assert not any(rotate(emulated_library, mistake, 0, seed) for seed in range(5))


@pytest.mark.parametrize(
    ("mistake", "way", "words"),
    [
        ("PAST_THE_END", 0, "read of 4 bytes .* past the end"),
        ("MISALIGNED", 1, "aligned"),
        ("PAST_SHARED", 0, "shared memory written .* past the end"),
        ("NO_DEPENDENCY_WAIT", 0, "before wait_for_previous_kernel"),
        ("READ_TOO_EARLY", 0, "before wait_for_previous_kernel"),
        ("DEADLOCK", 0, "deadlock in rotate, block .* at a named barrier"),
        ("UNEQUAL_COUNTS", 0, "named barrier 1 of (64|96) threads is used with (64|96)"),
        ("LANES_APART", 0, "lanes of one warp are at"),
        ("TOO_MANY_ARRIVALS", 2, "more arrivals"),
        ("NO_PHASE_BARRIER", 2, "not initialised"),
        ("NO_BARRIER", 0, RACE),
        (
            "NO_COPY_WAIT",
            1,
            r"reads offset \d+, which a cp.async of thread \d+ has written and not waited for, in rotate",
        ),
        ("NO_PHASE_WAIT", 2, r"reads offset \d+, which a copy of the copy engine \(phase 0 .* nothing orders the two"),
        ("WARP_MISSES_BARRIER", 0, RACE),
        ("TOO_MANY_BYTES", 0, "expects 1048576 bytes in a phase, at most 1048575"),
        ("REGISTERS_TAKEN_BY_LESS", 0, "take_registers to 24 of a warp that has 255"),
    ],
)
def test_mistakes_that_are_reported(emulated_library: Any, mistake: str, way: int, words: str) -> None:
    """Whatever the order of threads."""
    for seed in range(5):
        with pytest.raises(RuntimeError, match=words):
            rotate(emulated_library, mistake, way, seed)
    assert rotate(emulated_library, "NONE", way), "the library stays usable"


def square(library: Any, mistake: str, seed: int) -> bool:
    library.emulator.seed(seed)
    a, d = small_integers(64, 64), torch.empty(128, 32)
    held = swizzled(a).contiguous()
    library.checks.square(d.data_ptr(), held.data_ptr(), MISTAKES.index(mistake))
    return matrix_of(d).equal(a.float() @ a.float().T)


def test_more_registers_than_a_multiprocessor_has(emulated_library: Any) -> None:
    with pytest.raises(RuntimeError, match="rotate: the warps of a block ask for 131072 registers, .* has 65536"):
        rotate(emulated_library, "TOO_MANY_REGISTERS", 0, threads=512)


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("NO_PROXY_FENCE", r"multiplies offset \d+, which thread \d+ has written without a fence_async_proxy"),
        ("FENCE_BY_ONE", r"multiplies offset \d+, which thread [1-9]\d* has written without a fence_async_proxy"),
        ("NO_PRODUCT_WAIT", "ended before its products of wgmma were done"),
        ("OVERWRITTEN_EARLY", r"writes offset \d+, which the tensor cores or the copy engine still read"),
        ("NO_PRODUCT_FENCE", "without wgmma_fence"),
    ],
)
def test_mistakes_around_the_tensor_cores(emulated_library: Any, mistake: str, words: str) -> None:
    for seed in range(5):
        with pytest.raises(RuntimeError, match=words):
            square(emulated_library, mistake, seed)
        assert square(emulated_library, "NONE", seed)


def test_arrays_that_are_not_known_are_refused(emulated_library: Any) -> None:
    x, y = torch.zeros(1, 128), torch.zeros(1, 128)
    emulator = emulated_library.emulator
    try:
        emulator.allow(x.data_ptr(), x.nbytes, True)
        emulator.allow(y.data_ptr() + 4, y.nbytes - 4)
        with pytest.raises(RuntimeError, match="write of 4 bytes .* 4 bytes before the start|write of 4 bytes"):
            emulated_library.checks.rotate(y.data_ptr(), x.data_ptr(), 1, 128, 0, 0)
        emulator.allow(y.data_ptr(), y.nbytes)
        emulated_library.checks.rotate(y.data_ptr(), x.data_ptr(), 1, 128, 0, 0)
        with pytest.raises(RuntimeError, match="past the end"):
            emulated_library.checks.rotate(y.data_ptr(), x.data_ptr(), 2, 128, 0, 0)
    finally:
        emulator.forget()


def test_constants_may_be_read_early_and_launches_are_recorded(emulated_library: Any) -> None:
    x, y = torch.zeros(3, 128), torch.zeros(3, 128)
    emulator = emulated_library.emulator
    emulator.clear_launches()
    try:
        emulator.allow(x.data_ptr(), x.nbytes, True)
        emulator.allow(y.data_ptr(), y.nbytes)
        emulated_library.checks.rotate(y.data_ptr(), x.data_ptr(), 3, 128, MISTAKES.index("READ_TOO_EARLY"), 0)
    finally:
        emulator.forget()
    (launch,) = emulator.launches()
    assert launch.pop("offset") > 0  # the kernel's place in the library
    assert set(launch.pop("counts").values()) == {0}  # nobody has asked for them
    assert launch == {
        "name": "rotate", "grid": (3, 1, 1), "cluster": 1, "threads": 128, "shared_bytes": 528, "is_dependent": True,
        "maps": [],
    }  # fmt: skip


@pytest.mark.parametrize("threads", [16, 48, 1056])
def test_launches_that_a_gpu_would_refuse(checks: Any, threads: int) -> None:
    x = torch.zeros(2048)
    with pytest.raises(RuntimeError, match=f"launch of rotate: {threads} threads"):
        checks.rotate(x.data_ptr(), x.data_ptr(), 1, threads, 0, 0)


def test_two_libraries_are_two_modules(emulated_library: Any, tmp_path: Path) -> None:
    """Also where the real one is built: what is opened is what lies at the path, not what was made under a name
    before.
    """
    copy = shutil.copy(build(), tmp_path)
    other = open_library(Path(copy))
    assert other is not emulated_library and other.emulator is not emulated_library.emulator
