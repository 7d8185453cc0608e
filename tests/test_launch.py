"""Launches that pass Triton's ``run`` by: the same variant with the same arguments, for every launch of an engine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from triton import knobs
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nemo_engine.benchmarks.kernel_report import _Target, run_engine, run_fp8, run_linear
from nemo_engine.ops.triton import launch
from nemo_engine.ops.triton.launch import Launcher, _TensorMaps


class Compiled:
    """Stands in for a compiled kernel, and notes what it is launched with."""

    function, packed_metadata, launch_cooperative_grid, launch_pdl = 7, ("packed",), False, "dependent"
    global_scratch_size = profile_scratch_size = 0

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.run = self

    def launch_metadata(self, *_: Any) -> None:
        return None

    def launch(self, *args: Any) -> None:
        self.launches.append(args)

    def __call__(
        self, *args: Any
    ) -> None:  # as Triton's launcher: (grid), stream, function, metadata, hooks, arguments
        self.launch(*args[:5], False, "dependent", None, None, *args[5:])


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Compiled]]:
    """Kernels are not compiled; what would have been."""
    made: list[Compiled] = []

    def compile_none(self: JITFunction, key: Any, signature: Any, device: Any, *_: Any) -> Compiled:
        made.append(Compiled())
        self.device_caches[device][0][key] = made[-1]
        return made[-1]

    monkeypatch.setattr(driver, "_active", _Target(90, object()))
    monkeypatch.setattr(JITFunction, "_do_compile", compile_none)
    yield made


def words_of(kernel: JITFunction, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[str, list[Any]]:
    """What Triton tells variants by, and what it launches with."""
    bound, specialization, options = kernel.device_caches[driver.active.get_current_device()][4](*args, **constants)
    return f"{specialization} {options}", list(bound.values())


@pytest.mark.parametrize("run", [run_engine, run_linear, run_fp8])
def test_every_launch_is_that_of_triton(run: Any, compiled: list[Compiled], monkeypatch: pytest.MonkeyPatch) -> None:
    words: dict[Any, str] = {}
    variants: dict[Any, Compiled] = {}
    counts = {"slow": 0, "all": 0}

    def checked(kernel: JITFunction) -> Any:
        launcher = Launcher(kernel)
        slow = launcher._slow

        def count(*args: Any, **options: Any) -> Any:
            counts["slow"] += 1
            return slow(*args, **options)

        launcher._slow = count

        def launch_it(*args: Any, grid: Any, warmup: bool, **constants: Any) -> None:
            assert launcher.key(*args) is not None, kernel
            key = *launcher.key(*args), *constants.items()
            told, bound = words_of(kernel, args, constants)
            assert words.setdefault((kernel, key), told) == told, kernel
            launcher(*args, grid=grid, warmup=warmup, **constants)
            ((header, passed),) = [(call[:13], call[13:]) for each in compiled for call in each.launches]
            (each,) = [each for each in compiled if each.launches]
            each.launches.clear()
            assert variants.setdefault((kernel, told), each) is each, kernel
            assert header[:10] == (*grid, *(1,) * (3 - len(grid)), 0, 7, False, "dependent", None, None, ("packed",))
            assert len(passed) == len(bound) and all(x is y or x == y for x, y in zip(passed, bound, strict=True))
            counts["all"] += 1

        return launch_it

    for kernel in launch.kernels():
        monkeypatch.setitem(vars(kernel), "run", checked(kernel))  # the class's own is there again afterwards
    run(90, 1)
    first = dict(counts)
    run(90, 1)
    assert counts["slow"] == first["slow"] == len(words) > 5 and counts["all"] == 2 * first["all"]


def test_what_triton_tells_apart_is_told_apart(compiled: list[Compiled]) -> None:
    from nemo_engine.kernels.batch import _advance_kernel, _build_kernel

    memory = torch.zeros(64, dtype=torch.int32)
    numbers = [0, 1, 2, 16, 17, 48, -1, -16, (1 << 31) - 1, 1 << 31, 1 << 40, -(1 << 40), True]
    tensors = [memory, memory[1:], memory[4:], memory.long(), memory.long()[1:], None]
    for kernel, num_tensors, num_numbers in ((_advance_kernel, 6, 3), (_build_kernel, 12, 4)):
        launcher, words = Launcher(kernel), {}
        names = [param.name for param in kernel.params if param.is_constexpr]
        for place, (tensor, number) in itertools.product(range(num_numbers), itertools.product(tensors, numbers)):
            given = [64] * num_numbers
            given[place] = number
            args = (tensor, *[memory] * (num_tensors - 1), *given)
            for constant in (1, 2):
                constants = dict.fromkeys(names, constant) | {"num_warps": 4}
                key = launcher.key(*args)
                told = words_of(kernel, args, constants)[0]
                assert key is None or words.setdefault((key, constant), told) == told, (args, constants)
        assert len(words) > 50


def test_anything_else_is_left_to_triton(compiled: list[Compiled]) -> None:
    from nemo_engine.kernels.batch import _advance_kernel

    launcher, memory = Launcher(_advance_kernel), torch.zeros(64)
    assert launcher.key(memory, "text") is None and launcher.key(memory, 1) is not None
    args, options = (*[memory] * 6, 64, 3, 3), {"ROWS": 128, "num_warps": 4}
    for _ in range(2):
        assert launcher(*args, grid=lambda bound: (bound["num_rows"],), warmup=False, **options) is compiled[0]
    assert [call[:3] for call in compiled[0].launches] == [(3, 1, 1)] * 2
    assert not any(known for _, known in launcher._by_types.values())
    compiled[0].launches.clear()
    hooks = [knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook]
    for hook in hooks:
        seen: list[Any] = []
        hook.add(seen.append)
        try:
            launcher(*args, grid=(3,), warmup=False, **options)
        finally:
            hook.remove(seen.append)
        assert hook in compiled[0].launches.pop()[10:13], "hooks are Triton's to call"
    assert launcher(*args, grid=(3,), warmup=True, **options) is compiled[0] and not compiled[0].launches


def test_all_kernels_are_launched_so_once_it_is_asked_for(compiled: list[Compiled]) -> None:
    driver.active.utils = SimpleNamespace(fill_tma_descriptor=lambda *args: args)
    try:
        for _ in range(2):
            launch.install()
        assert all(isinstance(kernel.run, Launcher) for kernel in launch.kernels())
        assert len({kernel.__name__ for kernel in launch.kernels()}) > 15
        memory, kernel = torch.zeros(64), next(k for k in launch.kernels() if k.__name__ == "_advance_kernel")
        for _ in range(2):
            kernel[(3,)](*[memory] * 6, 64, 3, 3, ROWS=128, num_warps=4)
        assert [call[:3] for call in compiled[0].launches] == [(3, 1, 1)] * 2
        assert isinstance(driver.active.utils.fill_tma_descriptor._fill, FunctionType)
    finally:
        for kernel in launch.kernels():
            del kernel.run
            kernel.__class__ = JITFunction


def test_another_triton_launches_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.__version__", "3.7.0")
    monkeypatch.setattr(driver, "_active", SimpleNamespace(utils=SimpleNamespace()))  # with other insides
    launch.install()
    assert not any("run" in vars(kernel) for kernel in launch.kernels())


def test_a_tensor_map_is_encoded_once() -> None:
    made: list[tuple[Any, ...]] = []

    def fill(*args: Any) -> object:
        made.append(args)
        return object()

    maps, args = _TensorMaps(fill), (4096, 2, 1, 0, [64, 64], [100, 512], [512, 1], 0)
    assert maps(*args) is maps(*args) and made == [args]
    assert maps(8192, *args[1:]) is not maps(*args) and maps(*args[:5], [99, 512], *args[6:]) is not maps(*args)
