"""How long a call takes on a device, what the device can do at most, and the row of a table that says how near the one
is to the other.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_engine.ops import Op, Site
from nemo_engine.ops.op import SEMANTICS

Timer = Callable[[Callable[[], object]], float]  # median milliseconds of a call

Args = tuple[Any, ...]
Calls = dict[str, Callable[[], Any]]  # by the name of what they run

FAR_OFF = 0.05  # relative: bf16 results differ by some 0.005, FP8 ones by 0.02 where single values round the other way
_WIDTHS = (20, 36, 26)  # of the table's text columns
_ONCE_CASES = 2  # the smallest of an operation
_WARM_UPS = 3  # compile, allocate, and let the clock rise
_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU so far
_CYCLES_PER_MS = 2_000_000  # of the fastest SM clock: at a slower one the device sleeps longer
_LEAD_MS = 0.1  # more than the host is ahead of the device by its own account
_LONGEST_LEAD_MS = 5.0


class DeviceTimer:
    """Median device milliseconds of a call with a cold L2, by events.

    Launches cost nothing unless the call waits for the device.

    Before each call a buffer larger than L2 is read (written, its dirty lines would be written back within the measured
    time), and the device sleeps for as long as the host needs to launch the call, so that no kernel waits for the host.
    """

    def __init__(self, rounds: int = 20) -> None:
        self.rounds = rounds
        self._flush = torch.zeros(_FLUSH_BYTES // 4, device="cuda")
        self._sink = torch.zeros((), device="cuda")

    def __call__(self, call: Callable[[], object]) -> float:
        for _ in range(_WARM_UPS):
            call()
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        host_ms = (time.perf_counter() - start) * 1e3
        cycles = int(min(1.5 * host_ms + _LEAD_MS, _LONGEST_LEAD_MS) * _CYCLES_PER_MS)
        return statistics.median(self._elapsed(call, cycles) for _ in range(self.rounds))

    def _elapsed(self, call: Callable[[], object], lead_cycles: int) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.sum(self._flush, dim=0, out=self._sink)
        torch.cuda._sleep(lead_cycles)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)


class HostTimer:
    """Median wall-clock milliseconds of a call on the CPU, caches as they are."""

    def __init__(self, rounds: int = 20) -> None:
        self.rounds = rounds

    def __call__(self, call: Callable[[], object]) -> float:
        call()
        times = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e3)
        return statistics.median(times)


def timer_for(device: torch.device, rounds: int = 20) -> Timer:
    """The timer of ``device``."""
    return DeviceTimer(rounds) if device.type == "cuda" else HostTimer(rounds)


@dataclass(frozen=True, slots=True)
class Ceilings:
    """What the device can do at most: bytes copied (read plus written) and matrix operations per second."""

    bytes_per_s: float
    bf16_flops_per_s: float
    fp8_flops_per_s: float  # bf16's where the device has no FP8 product

    def least_seconds(self, num_bytes: float, flops: float, is_fp8: bool = False) -> float:
        """The roofline: the longer of moving the bytes and computing the operations. FP8 or bf16 products."""
        return max(num_bytes / self.bytes_per_s, flops / (self.fp8_flops_per_s if is_fp8 else self.bf16_flops_per_s))


def copy_rate(timer: Timer, count: int, device: torch.device) -> float:
    """Bytes per second, read plus written, of a copy of ``count`` fp32 numbers."""
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timer(lambda: target.copy_(source)) * 1e3


def measure_ceilings(timer: Timer, device: torch.device) -> Ceilings:
    """Copy 2 GiB, and multiply square matrices of 8192 in bf16 and FP8. On a CPU 64 MiB and 512, the better of bf16 and
    fp32, and the best of several tries, since others may be at work on it.
    """
    is_gpu = device.type == "cuda"
    count, n, tries = ((1 << 29), 8192, 1) if is_gpu else ((1 << 24), 512, 5)
    bytes_per_s = max(copy_rate(timer, count, device) for _ in range(tries))
    a, b = (torch.randn(n, n, device=device).to(torch.bfloat16) for _ in range(2))
    bf16 = 2 * n**3 / min(timer(lambda: a @ b.t()) for _ in range(tries)) * 1e3
    if not is_gpu:
        wide_a, wide_b = a.float(), b.float()
        bf16 = max(bf16, 2 * n**3 / min(timer(lambda: wide_a @ wide_b.t()) for _ in range(tries)) * 1e3)
    fp8 = bf16
    if is_gpu and torch.cuda.get_device_capability(device) >= (8, 9):
        scale = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)

        def product() -> Tensor:
            return torch._scaled_mm(
                a8, b8.t(), scale_a=scale, scale_b=scale, out_dtype=torch.bfloat16, use_fast_accum=True
            )

        fp8 = 2 * n**3 / timer(product) * 1e3
    return Ceilings(bytes_per_s, bf16, fp8)


@dataclass(frozen=True, slots=True)
class Size:
    """Named arguments of an operation, made on the device, and what else computes the same from them.

    ``site``: facts of the ``Site`` that follow from these arguments.
    """

    name: str
    make: Callable[[], Args]
    baselines: Callable[..., Calls]
    is_comparable: bool = True  # by value with the first baseline
    site: Mapping[str, Any] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement.

    ``speedup``: times as fast as the best baseline; ``difference``: from the first baseline's result.
    """

    op: str
    size: str
    implementation: str
    is_baseline: bool
    us: float | None = None
    gb_per_s: float | None = None
    tflop_per_s: float | None = None
    fraction: float | None = None  # of the roofline
    speedup: float | None = None
    difference: float | None = None
    error: str | None = None

    @classmethod
    def of(
        cls, op: str, size: str, name: str, is_baseline: bool, us: float, cost: tuple[int, int], ceilings: Ceilings
    ) -> Row:
        """The rates of a call of ``us`` microseconds that must move and compute ``cost`` (bytes, operations)."""
        num_bytes, flops = cost
        is_fp8 = "linear" in op and op.endswith("_fp8")
        least_us = ceilings.least_seconds(num_bytes, flops, is_fp8) * 1e6
        return cls(op, size, name, is_baseline, us, num_bytes / us / 1e3, flops / us / 1e6, least_us / us)

    def format(self) -> str:
        """A line of the table."""
        names = (self.op, self.size, self.implementation + (" *" if self.is_baseline else ""))
        text = "  ".join(name.ljust(width) for name, width in zip(names, _WIDTHS, strict=True))
        if self.us is None:
            return f"{text}  {'ran' if self.error is None else f'error: {self.error}'}"
        speedup = "-" if self.speedup is None else f"{self.speedup:.2f}x"
        difference = "-" if self.difference is None else f"{self.difference:.1e}"
        return (
            f"{text}  {self.us:11.2f}  {self.gb_per_s:8.1f}  {self.tflop_per_s:8.2f}  {self.fraction:8.1%}  "
            f"{speedup:>8s}  "
            f"{difference:>9s}" + (f"  error: {self.error}" if self.error else "")
        )


HEADER = (
    "  ".join(name.ljust(width) for name, width in zip(("op", "size", "implementation"), _WIDTHS, strict=True))
    + f"  {'us':>11s}  {'GB/s':>8s}  {'TFLOP/s':>8s}  {'roofline':>8s}  {'vs best':>8s}  {'differs':>9s}"
)


def describe(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"


def relative_difference(got: Tensor, reference: Tensor) -> float:
    """Norm of the difference over the norm of ``reference``; NaN if either holds one.

    Shapes may differ, counts may not.
    """
    reference_f32 = reference.float()
    return float((got.reshape(reference.shape).float() - reference_f32).norm() / reference_f32.norm().clamp(min=1e-30))


def implementations(op: Op, site: Site) -> list[tuple[str, Callable[[], Callable[..., Any]]]]:
    """Names and loaders of what supports ``site``; the definition where nothing does, since an engine runs it then."""
    candidates = [(impl.name, impl.load) for impl in op.impls if impl.supports(site) is None]
    return candidates or [(SEMANTICS, lambda: op.semantics)]


def first_tensor(result: Any) -> Tensor:
    """The main result of an operation."""
    return result[0] if isinstance(result, tuple) else result


def measure_size(op: Op, site: Site, size: Size, timer: Timer, ceilings: Ceilings) -> Iterator[Row]:
    """The baselines of one size, then every implementation."""
    try:
        args = size.make()
        cost = op.cost(*args)
        baselines = size.baselines(*args)
    except Exception as error:
        yield Row(op.name, size.name, "inputs", False, error=describe(error))
        return
    best, reference = math.inf, None
    for name, call in baselines.items():
        try:
            result = first_tensor(call())
            us = timer(call) * 1e3
        except Exception as error:
            yield Row(op.name, size.name, name, True, error=describe(error))
            continue
        best = min(best, us)
        if reference is None and size.is_comparable:
            reference = result
        yield Row.of(op.name, size.name, name, True, us, cost, ceilings)
    for name, load in implementations(op, dataclasses.replace(site, **size.site)):
        try:
            function = load()
            result = first_tensor(function(*args))
            difference = None if reference is None else relative_difference(result, reference)
            us = timer(lambda function=function: function(*args)) * 1e3
        except Exception as error:
            yield Row(op.name, size.name, name, False, error=describe(error))
            continue
        is_off = difference is not None and not difference <= FAR_OFF  # NaN is
        yield dataclasses.replace(
            Row.of(op.name, size.name, name, False, us, cost, ceilings),
            speedup=best / us if baselines and best < math.inf else None,
            difference=difference,
            error="differs from the first baseline" if is_off else None,
        )


def on_device(value: Any, device: torch.device) -> Any:
    """``value`` with every tensor in it on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(on_device(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [field.name for field in dataclasses.fields(value) if field.init]
        return dataclasses.replace(value, **{name: on_device(getattr(value, name), device) for name in fields})
    return value


def run_once(op: Op, site: Site, device: torch.device) -> Iterator[Row]:
    """Every implementation on the smallest cases that are not empty, untimed: for tools that make everything slow."""
    costs = []
    for index, case in enumerate(op.cases()):
        args = case.make(torch.bfloat16)
        if args[0].numel() and (num_bytes := op.cost(*args)[0]):
            costs.append((num_bytes, index, case))
    for _, _, case in sorted(costs)[:_ONCE_CASES]:
        for name, load in implementations(op, dataclasses.replace(site, **case.site)):
            try:
                load()(*on_device(case.make(torch.bfloat16), device))
                if device.type == "cuda":
                    torch.cuda.synchronize()
                yield Row(op.name, f"case {case.name}", name, False)
            except Exception as error:
                yield Row(op.name, f"case {case.name}", name, False, error=describe(error))


def is_usable(device: torch.device) -> bool:
    """Whether the device still computes: after an illegal access nothing in this process does."""
    try:
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return False
    return True
