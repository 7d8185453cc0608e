"""What all tests share: one torch thread (set before torch is first imported), and GPU tests only where there is a
GPU.
"""

import os
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
try:
    from hypothesis import settings
except ImportError:  # a machine with a GPU may lack it, and the tests for GPUs do without
    pass
else:
    settings.register_profile("shared-machine", deadline=None)
    settings.load_profile("shared-machine")

LONG = (
    "test_interpreted_operations.py",
    "test_interpreted_others.py",
    "test_kernel_report.py",
    "test_ops.py",
    "test_planted_mistakes.py",
    "test_cuda_build.py",
    "test_long_context.py",
)

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.helpers.interpreter import install

    install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":  # tests/helpers/interpreted.py runs these
        apart = [item for item in items if item.get_closest_marker("interpreted")]
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if not item.get_closest_marker("interpreted")]
    # `make test` gives whole files to three processes: the long ones first, so that none is left with one at the end.
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture(scope="session")
def emulated_library() -> Any:
    """The CUDA kernels compiled for the CPU; skips where there is no C++ compiler."""
    from tests.emulation.library import load, why_not

    reason = why_not()
    if reason:
        pytest.skip(reason)
    return load()


@pytest.fixture
def small_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's kernels launch as on a GPU of 8 multiprocessors: the interpreter runs a launch's programs one after the
    other.
    """
    from nemo_engine.kernels import device

    monkeypatch.setattr(device, "elsewhere", device.Facts(8, device.HOPPER.shared))
