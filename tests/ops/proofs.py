"""How an implementation of an operation is proven against its definition: a tolerance that is derived, and poison."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from nemo_engine.ops.fused import Sum
from nemo_engine.ops.op import Case, Op

# Norm-wise relative error in units of the dtype's epsilon: catches a small systematic error under a loose maximum. In
# bf16 the final rounding alone is 0.3; in fp32 SDPA's own exponential has an error of some units. The units in the last
# place that a row may be off beyond the definition's own error follow for the same reasons.
ROW_UNITS = {torch.float8_e4m3fn: 2, torch.bfloat16: 2, torch.float32: 6, torch.float64: 2}
GLOBAL_FLOOR = {torch.float8_e4m3fn: 1.0, torch.bfloat16: 1.0, torch.float32: 4.0, torch.float64: 8.0}


class KeepNarrow(TorchFunctionMode):
    """Inside it, tensors are not widened beyond ``dtype``: a definition then rounds every intermediate."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in (Tensor.float, Tensor.to) and args[0].dtype.itemsize <= self.dtype.itemsize < 4:
            if args[0].is_floating_point() and (func is Tensor.float or args[1] is torch.float32):
                return args[0].to(self.dtype)
        return func(*args, **(kwargs or {}))


def mapped(value: Any, change: Callable[[Tensor], Tensor], device: str = "cpu") -> Any:
    """``value`` with ``change`` applied to every floating tensor of it, and a copy of every other one on ``device``."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value.to(device, copy=True)
    if isinstance(value, tuple):
        return tuple(mapped(item, change, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        made = {
            name: {} if isinstance(field, dict) else mapped(field, change, device) for name, field in fields.items()
        }
        return dataclasses.replace(value, **made)
    return value


def tensors(value: Any) -> list[Tensor]:
    """The tensors of ``value``. Of a sum that is left to its reader, the sum."""
    if isinstance(value, Sum):
        return [value.x if value.residual is None else value.x + value.residual]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in tensors(item)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return tensors(tuple(getattr(value, field.name) for field in dataclasses.fields(value)))
    return [value] if isinstance(value, Tensor) else []


def amid_poison(tensor: Tensor) -> Tensor:
    """A copy of a matrix that has NaN before, after and beside its rows. Others are plainly copied."""
    if tensor.dim() != 2:
        return tensor.clone()
    rows, width = tensor.shape
    frame = tensor.new_full((rows + 2, width + 16), torch.nan)
    frame[1:-1, :width] = tensor
    return frame[1:-1, :width]


def settle(args: tuple[Any, ...]) -> None:
    """Wait for the copies that made ``args``: the CUDA kernels read weights before the kernel before them has ended."""
    if any(tensor.is_cuda for tensor in tensors(args)):
        torch.cuda.synchronize()


def run(function: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """All that a call leaves behind: what it returns, and every argument as it is afterwards."""
    settle(args)
    return [*tensors(function(*args)), *tensors(args)]


def assert_close(
    got: Tensor, low: Tensor, exact: Tensor, dtype: torch.dtype, what: str, *, rounds_within: bool = False
) -> None:
    """Per row at most twice the error of ``low`` plus some units in the last place; NaN exactly where ``exact`` has it.

    rounds_within: the operation rounds to less than its results' precision on the way; as a whole it may then be off by
    little more than ``low``, which does so too.
    """
    assert got.shape == exact.shape, (what, got.shape, exact.shape)
    assert torch.equal(got.double().isnan(), exact.isnan()), f"{what}: NaN in other places than the definition has it"
    if not got.numel():
        return
    coarser = max(
        got.dtype, dtype, key=lambda one: torch.finfo(one).eps
    )  # an fp32 scale of bf16 values is no better than they
    eps, floor, units = torch.finfo(coarser).eps, GLOBAL_FLOOR[coarser], ROW_UNITS[coarser]
    got, low, exact = (rows_of(tensor) for tensor in (got, low, exact))
    error, allowed, largest = ((x.abs().amax(1)) for x in (got - exact, low - exact, exact))
    excess = (error - 2 * allowed - units * eps * largest).max().item()
    assert excess <= 0, f"{what}: a row's error is {excess:.3g} over its bound"
    relative, of_low = (((x - exact).norm() / exact.norm().clamp(min=1e-300)).item() / eps for x in (got, low))
    assert relative <= max(floor, 1.1 * of_low if rounds_within else 0.0), (
        f"{what}: the error as a whole is {relative:.2f} epsilon"
    )


def rows_of(tensor: Tensor) -> Tensor:
    """A tensor as a matrix in fp64, NaN as 0."""
    return tensor.double().nan_to_num(nan=0.0).reshape(tensor.shape[0] if tensor.dim() > 1 else 1, -1)


def run_low(op: Op, case: Case, dtype: torch.dtype, exact: list[Tensor]) -> list[Tensor]:
    """The definition with every intermediate in ``dtype``; for fp64, which nothing is wider than, four times fp32's
    error scaled down.
    """
    low_dtype = torch.float32 if dtype is torch.float64 else dtype
    with KeepNarrow(low_dtype):
        low = run(op.semantics, mapped(case.make(low_dtype), torch.clone))
    if dtype is not torch.float64:
        return low
    scale = 4 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    return [
        right + (narrow.double() - right) * scale if right.is_floating_point() else narrow
        for narrow, right in zip(low, exact, strict=True)
    ]


@contextlib.contextmanager
def new_memory_poisoned() -> Iterator[None]:
    """Inside, what is allocated holds NaN, or the largest integer, until it is written."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def prove(
    op: Op,
    function: Callable[..., Any],
    case: Case,
    dtype: torch.dtype,
    device: str = "cpu",
    *,
    is_serial: bool = False,
) -> None:
    """Accuracy, poison, untouched buffers and determinism of ``function``, run on ``device``, on ``case``; integers
    must be equal.

    is_serial: its programs run one after the other, as in Triton's interpreter. Two runs then differ only by what it
    reads before it was written, so it runs once, on new memory that is poisoned.
    """
    args = case.make(dtype)
    plain = run(op.semantics, mapped(args, torch.clone))
    runs = []
    for _ in range(1 if is_serial else 2):
        with new_memory_poisoned() if is_serial else contextlib.nullcontext():
            left = run(function, mapped(args, lambda x: amid_poison(x.to(device)), device))
        runs.append([tensor.cpu() for tensor in left])
    got, again = runs[0], runs[-1]
    assert [tensor.dtype for tensor in got] == [tensor.dtype for tensor in plain]
    if not any(tensor.is_floating_point() for tensor in tensors(op.semantics(*mapped(args, torch.clone)))):
        for index, (one, other, same) in enumerate(zip(got, again, plain, strict=True)):
            what = f"{op.name}, {case.name}, tensor {index}, {dtype}: not what the definition gives"
            assert torch.equal(one, same) and torch.equal(other, same), what
        return
    exact = run(op.semantics, mapped(args, torch.Tensor.double))
    low = run_low(op, case, dtype, exact)
    assert len(got) == len(low) == len(exact)
    for index, (one, other, same, lo, ex) in enumerate(zip(got, again, plain, low, exact, strict=True)):
        what = f"{op.name}, {case.name}, tensor {index}, {dtype}"
        if not one.is_floating_point():
            assert torch.equal(one, same) and torch.equal(other, same), f"{what}: other integers than the definition's"
            continue
        assert torch.equal(*(x.double().nan_to_num(nan=7.0) for x in (one, other))), f"{what}: differs from run to run"
        assert_close(one, lo, ex, dtype, what, rounds_within=op.is_fp8 and op.composed is not None)
