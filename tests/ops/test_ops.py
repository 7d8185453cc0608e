"""Every implementation of every operation against its definition, on every case: on this CPU, in Triton's interpreter,
and on a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from nemo_engine.ops import ALL_OPS, Op, Site
from nemo_engine.ops.op import CUDA_NOT_BUILT, Case, Impl
from nemo_engine.ops.sample import SAMPLE, SlotParams
from nemo_engine.runner.graphs import Capture, Captured, cuda_capture
from tests.emulation.library import emulated, watched
from tests.ops.proofs import mapped, prove, settle, tensors

DTYPES = (torch.bfloat16, torch.float32, torch.float64)
# Why a kernel for GPUs does not serve a CPU as it is: there, it is interpreted or emulated.
NOT_ON_A_CPU = (
    "Triton runs on a CPU with TRITON_INTERPRET=1 only",
    CUDA_NOT_BUILT,
    "built for cuda, this is cpu",
)


def site(dtype: torch.dtype = torch.float32, device_type: str = "cpu", **facts: Any) -> Site:
    return dataclasses.replace(
        Site(
            device_type=device_type,
            capability=(9, 0) if device_type == "cuda" else None,
            dtype=dtype,
            num_heads=4,
            num_kv_heads=2,
            head_dim=16,
            page_size=16,
            hidden_size=64,
            intermediate_size=64,
        ),
        **facts,
    )


def is_compiled_for_tests_alone(op: Op, impl: Impl, case: Case, dtype: torch.dtype) -> bool:
    """Triton's attention in fp32 with heads of 128 compiles for 15 s a case, and no NeMo is served so: in the
    interpreter it is proven all the same.
    """
    is_fp32_attention = op.name == "paged_attention" and impl.name == "triton" and dtype is torch.float32
    return is_fp32_attention and site(**case.site).head_dim >= 128


def proofs(device_type: str) -> Iterator[Any]:
    """Every case of every implementation that runs on ``device_type``, or there in the interpreter or in emulation."""
    for op in ALL_OPS:
        for impl in op.impls:
            for dtype in DTYPES:
                if impl.name == "triton" and dtype == torch.float64:
                    continue
                marks = []
                if device_type == "cpu" and impl.name in ("triton", "cuda"):
                    marks = [pytest.mark.interpreted if impl.name == "triton" else pytest.mark.emulated]
                for case in op.cases():
                    if device_type == "cuda" and is_compiled_for_tests_alone(op, impl, case, dtype):
                        continue
                    reason = impl.supports(site(dtype, device_type, **case.site))
                    if reason is None or device_type == "cpu" and reason in NOT_ON_A_CPU:
                        name = f"{op.name}-{impl.name}-{case.name}-{str(dtype).removeprefix('torch.')}"
                        yield pytest.param(op, impl, case, dtype, id=name, marks=marks)


@pytest.mark.parametrize(("op", "impl", "case", "dtype"), list(proofs("cpu")))
def test_implementation(op: Op, impl: Impl, case: Case, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    if impl.name != "cuda":
        prove(op, impl.load(), case, dtype, is_serial=impl.name == "triton")
        return
    library = request.getfixturevalue("emulated_library")
    with emulated(library):
        assert impl.supports(site(dtype, **case.site)) is None
        prove(op, watched(library, op, impl.load()), case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(("op", "impl", "case", "dtype"), list(proofs("cuda")))
def test_implementation_on_a_gpu(op: Op, impl: Impl, case: Case, dtype: torch.dtype) -> None:
    if op is SAMPLE:
        pytest.skip("a GPU's logarithms end in other bits: test_sample compares its tokens")
    prove(op, impl.load(), case, dtype, "cuda")


def assert_replays(op: Op, impl: Impl, case: Case, dtype: torch.dtype, device: str, capture: Capture) -> None:
    """Captured once and replayed on other numbers, it leaves the bits of an eager call."""
    function = impl.load()
    args = mapped(case.make(dtype), lambda x: x.to(device, copy=True), device)
    start = [tensor.clone() for tensor in tensors(args)]
    captured = capture(lambda: function(*args))
    numbers = {id(x) for x in tensors(tuple(a for a in args if not isinstance(a, SlotParams))) if x.is_floating_point()}
    for tensor, before in zip(tensors(args), start, strict=True):
        ramp = torch.linspace(-1.0, 0.5, before.numel(), dtype=torch.float64, device=device).view(before.shape)
        tensor.copy_((before.double() * ramp.abs()).to(before.dtype) if id(tensor) in numbers else before)
    own = mapped(args, torch.clone, device)
    settle(own)
    expected = [*tensors(function(*own)), *tensors(own)]
    captured.replay()
    got = [*tensors(captured.outputs), *tensors(args)]
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert torch.equal(*(x.double().nan_to_num(nan=7.0) for x in (one, other))), f"{op.name}, {case.name}, {index}"


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "op", [op for op in ALL_OPS if any(impl.name == "triton" for impl in op.impls)], ids=lambda op: op.name
)
def test_captured_kernels_replay_in_emulation(op: Op) -> None:
    from tests.runner.emulated_graphs import emulated_capture

    triton = next(impl for impl in op.impls if impl.name == "triton")
    cases = [case for case in op.cases() if case.make(torch.bfloat16)[0].numel() > 64]
    for case in cases[1:3]:
        assert_replays(op, triton, case, torch.bfloat16, "cpu", emulated_capture)
        if op.name not in ("build_batch_", "advance_", "draft_"):  # whose numbers are all integers, and stay
            with pytest.raises(AssertionError):
                assert_replays(op, triton, case, torch.bfloat16, "cpu", lambda f: Captured(f(), lambda: None))


@pytest.mark.gpu
@pytest.mark.parametrize("op", ALL_OPS, ids=lambda op: op.name)
def test_captured_kernels_replay_on_a_gpu(op: Op) -> None:
    for impl in op.impls:
        for case in op.cases():
            if impl.supports(site(torch.bfloat16, "cuda", **case.site)) is None:
                if case.make(torch.bfloat16)[0].numel():
                    assert_replays(op, impl, case, torch.bfloat16, "cuda", cuda_capture(torch.device("cuda")))


@pytest.mark.parametrize("op", ALL_OPS, ids=lambda op: op.name)
def test_definition_reads_no_poison(op: Op) -> None:
    costs = []
    for case in op.cases():
        args = case.make(torch.float64)
        costs.append(op.cost(*args))
        for tensor in tensors(op.semantics(*args)):  # a case that hands in NaN to be computed with says so
            assert tensor.isnan().any() == case.name.startswith("NaN"), case.name
    assert all(num_bytes >= 0 and flops >= 0 for num_bytes, flops in costs)
    assert max(costs) > (0, 0) and (
        op.name == "embed" or any(num_bytes > 0 and flops > 0 for num_bytes, flops in costs)
    )


def broken(kind: str, op: Op) -> Callable[..., Any]:
    """The definition with something wrong."""

    def function(*args: Any) -> Any:
        result = op.semantics(*args)
        first = result[0] if isinstance(result, tuple) else result
        if kind == "a factor":
            first = (first.float() * 1.02).to(first.dtype)
        elif kind == "a row":
            first = first.roll(1, 0)
        elif kind == "a NaN" and len(first):
            first = first.clone().index_fill_(0, torch.tensor([len(first) - 1]), torch.nan)
        elif kind == "another dtype":
            first = first.float() if first.dtype == torch.bfloat16 else first.bfloat16()
        elif kind == "an argument changed":
            args[0].add_(1)
        elif kind == "another result each time":
            first = first + torch.rand(()).item()
        return (first, *result[1:]) if isinstance(result, tuple) else first

    return function


@pytest.mark.parametrize(
    "kind", ["a factor", "a row", "a NaN", "another dtype", "an argument changed", "another result each time"]
)
@pytest.mark.parametrize("name", ["rms_norm", "paged_attention", "build_batch_", "linear"])
def test_a_proof_catches(kind: str, name: str) -> None:
    op = next(op for op in ALL_OPS if op.name == name)
    if name == "build_batch_" and kind in ("a NaN", "another dtype", "a factor"):
        kind = "a row"  # it returns integers
    caught = 0
    for case in op.cases():
        prove(op, op.semantics, case, torch.bfloat16)
        try:
            prove(op, broken(kind, op), case, torch.bfloat16)
        except AssertionError:
            caught += 1
    assert caught >= 3, f"only {caught} cases see it"


@pytest.mark.interpreted
def test_the_interpreter_finds_an_offset_that_32_bits_do_not_hold() -> None:
    triton, tl = pytest.importorskip("triton"), pytest.importorskip("triton.language")

    @triton.jit
    def offset(at, rows, width: tl.constexpr) -> None:
        tl.store(at, rows * width)

    @triton.jit
    def offsets(at, rows, width: tl.constexpr) -> None:
        tl.store(at + tl.arange(0, 2), (rows + tl.arange(0, 2)) * width)

    at = torch.zeros(2, dtype=torch.int64)
    for kernel in (offset, offsets):
        kernel[(1,)](at, 1 << 15, 1 << 15)
        assert at[0].item() == 1 << 30
        with pytest.raises(Exception, match="int32 overflow"):
            kernel[(1,)](at, (1 << 16) - (kernel is offsets), 1 << 15)
