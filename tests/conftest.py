"""What all tests share: one torch thread (set before torch is first imported), and GPU tests only where there is a GPU."""

import os
from typing import Any

import pytest
from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
settings.register_profile("shared-machine", deadline=None)
settings.load_profile("shared-machine")

APART = "test_interpreted.py"  # whose tests share nothing
LONG = (APART, "test_kernel_report.py", "test_ops.py", "test_cuda_build.py", "test_long_context.py")

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.interpreter import install

    install()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":  # test_interpreted runs these
        apart = [item for item in items if item.get_closest_marker("interpreted")]
        config.hook.pytest_deselected(items=apart)
        items[:] = [item for item in items if not item.get_closest_marker("interpreted")]
    # For the processes of `make test`: a file stays in one, and the long ones go first, so that none is left over at the end.
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    for item in items if config.pluginmanager.hasplugin("xdist") else ():
        item.add_marker(pytest.mark.xdist_group(item.name if item.path.name == APART else str(item.path)))
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
