"""The part of a GPU's data sheet that kernels reach. Each number is measured, if a results file has it, or else
assumed, and says which.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from nemo_engine.planner.gpus import Gpu

_LARGE_ROWS = 4096  # a matrix product of so many rows is bound by arithmetic
_FP8_KERNELS = 3.6e12  # bytes/s of FP8 keys and values, implied by TensorRT-LLM's results on an H200: arithmetic binds


@dataclass(frozen=True, slots=True)
class Figure:
    """A number and its source: "assumed: ..." or "measured: ..."."""

    value: float
    source: str


_OF_MEMORY = {"HBM2e": Figure(1.7 / 2.039, "assumed: gpt-fast's README takes 1.7 of an A100's 2.039 TB/s")}


@dataclass(frozen=True, slots=True)
class Efficiencies:
    """Fractions and fixed costs that turn a data sheet into times.

    Ceilings, the fractions of the data sheet that a copy and a large product reach: memory, matmul_bf16, matmul_fp8.

    Fractions of these ceilings:
    weights: reading them for few rows.
    kv_bf16, kv_fp8: decode attention.
    linear, linear_fp8: large products inside a model.
    attention: prefill attention, of bf16's ceiling.

    elementwise: the part of norms, activations and rotary embedding that is memory traffic of its own.

    Microseconds:
    launch_us: one more kernel in a step.
    gap_us: a step, whatever is in it.
    host_us, host_us_per_request: planning and committing a step.
    link_us: one reduction over several GPUs.
    """

    memory: Figure = Figure(4.3 / 4.8, "assumed: a copy on an H200 reaches 4.3 of 4.8 TB/s")
    matmul_bf16: Figure = Figure(788 / 989, "assumed: cuBLAS on an H200 reaches 788 of 989 TFLOP/s")
    matmul_fp8: Figure = Figure(788 / 989, "assumed: as bf16's")
    weights: Figure = Figure(0.88, "assumed: between published kernels' 0.8 and the goal of 0.9")
    kv_bf16: Figure = Figure(0.93, "assumed: FlashAttention 3 and TileOPs on an H200 reach 0.83 to 0.99")
    kv_fp8: Figure = Figure(0.84, "derived: TensorRT-LLM 1.0 on an H200 implies 3.6 of 4.3 TB/s; others stop at 3.0")
    linear: Figure = Figure(0.87, "assumed: published kernels reach 0.85 to 0.95")
    linear_fp8: Figure = Figure(0.70, "derived: whole engines reach 0.65 to 0.75 in FP8 where prompts dominate")
    attention: Figure = Figure(0.75, "assumed: FlashAttention 3 reaches 0.66 to 0.78, causal, at 2k to 16k")
    elementwise: Figure = Figure(0.5, "assumed: half is fused into matrix products")
    launch_us: Figure = Figure(1.3, "assumed: a kernel boundary inside a CUDA graph on an H100")
    gap_us: Figure = Figure(500.0, "derived: what vLLM 0.19 takes on an H100 beyond reading the weights of an 8B")
    host_us: Figure = Figure(150.0, "assumed: planning, one upload and two launches")
    host_us_per_request: Figure = Figure(0.4, "assumed: schedule() and commit() measured at 0.15 us, and output")
    link_us: Figure = Figure(10.0, "assumed: latency of an all-reduce inside one machine")

    def ideal(self) -> Efficiencies:
        """These ceilings with perfect, free everything else: the rooflines that no engine can pass."""
        names = {field.name for field in fields(self)} - {"memory", "matmul_bf16", "matmul_fp8"}
        perfect = Figure(1.0, "ideal")
        free = Figure(0.0, "ideal")
        costs = {"elementwise", "launch_us", "gap_us", "host_us", "host_us_per_request", "link_us"}
        return replace(self, **{name: free if name in costs else perfect for name in names})

    @classmethod
    def assumed(cls, gpu: Gpu) -> Efficiencies:
        """The efficiencies of a ``gpu`` without measurements. Those measured on another memory or chip say so."""
        fractions = cls()
        if gpu.memory in _OF_MEMORY:
            fractions = replace(fractions, memory=_OF_MEMORY[gpu.memory])
        elif gpu.memory != "HBM3e":
            fractions = replace(fractions, memory=_carried(fractions.memory, gpu.memory))
        if not gpu.name.startswith("h"):
            names = ("matmul_bf16", "matmul_fp8")
            fractions = replace(fractions, **{name: _carried(getattr(fractions, name), "this chip") for name in names})
        copy = gpu.bytes_per_s * fractions.memory.value
        fp8 = min(fractions.kv_bf16.value, max(fractions.kv_fp8.value, _FP8_KERNELS / copy))
        if fp8 != fractions.kv_fp8.value:
            source = "assumed: as bf16's; arithmetic binds FP8 kernels at 3.6 TB/s, which this memory does not reach"
            fractions = replace(fractions, kv_fp8=Figure(fp8, source))
        return fractions

    @classmethod
    def read(cls, gpu: Gpu, folder: Path | None) -> Efficiencies:
        """The assumptions, but for those of which ``folder`` holds measurements on ``gpu`` (``*.jsonl`` of
        gpu_ceilings, latency).
        """
        fractions = cls.assumed(gpu)
        if folder is None:
            return fractions
        records = list(_records(gpu, folder))
        ceilings = [record for record in records if record.get("benchmark") == "gpu_ceilings"]
        precise = "fp8 rowwise precise accumulation"
        for name, peak, unit, rates in (
            ("memory", gpu.bytes_per_s, 1e9, _rates(ceilings, "copy", "gb_per_s")),
            ("matmul_bf16", gpu.bf16_flops_per_s, 1e12, _rates(ceilings, "bf16 cublas", "tflop_per_s")),
            ("matmul_fp8", gpu.fp8_flops_per_s, 1e12, _rates(ceilings, precise, "tflop_per_s")),
        ):  # fmt: skip
            if peak is not None and rates:
                rate, file = max(rates)
                fractions = replace(fractions, **{name: Figure(rate * unit / peak, f"measured: {file}")})
        return _with_decode(fractions, records)


def _carried(figure: Figure, to: str) -> Figure:
    return Figure(figure.value, f"{figure.source}; carried over to {to} without a measurement")


def _with_decode(fractions: Efficiencies, records: list[dict[str, Any]]) -> Efficiencies:
    """The fractions of decode steps, from measured steps if there are any, else as they are."""
    steps = [
        (float(record["fraction"]), _has_fp8_kv(record), record["file"])
        for record in records
        if record.get("benchmark") == "latency" and record.get("what") == "decode" and record.get("fraction")
    ]
    if not steps:
        return fractions
    every = Figure(statistics.median(step[0] for step in steps), f"measured, whole decode steps: {steps[0][2]}")
    free = Figure(0.0, "measured: contained in whole decode steps")
    fractions = replace(fractions, weights=every, launch_us=free, gap_us=free)
    for name, is_fp8 in (("kv_bf16", False), ("kv_fp8", True)):
        same_format = [step for step in steps if step[1] is is_fp8]
        if same_format:
            value = statistics.median(step[0] for step in same_format)
            fractions = replace(
                fractions, **{name: Figure(value, f"measured, whole decode steps: {same_format[0][2]}")}
            )
    return fractions


def _has_fp8_kv(record: dict[str, Any]) -> bool:
    return str((record.get("options") or {}).get("kv_cache_dtype")).startswith("fp8")


def _rates(records: list[dict[str, Any]], what: str, key: str) -> list[tuple[float, str]]:
    """(rate, file) of the records of ``what``. For products, only the large ones count."""
    return [
        (float(record[key]), record["file"])
        for record in records
        if record.get("what") == what and key in record and record.get("m", _LARGE_ROWS) >= _LARGE_ROWS
    ]


def _records(gpu: Gpu, folder: Path) -> Iterator[dict[str, Any]]:
    """All records that were measured on ``gpu``, with the name of their ``file``."""
    mark = gpu.name.replace("rtx", "rtx ")
    for file in sorted(folder.glob("*.jsonl")):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{file}:{number}: not a line of JSON: {error}") from None
            name = str(record.get("gpu") or "").lower() if isinstance(record, dict) else ""
            if mark in name and "pcie" not in name:  # PCIe cards have less of everything than SXM cards
                yield record | {"file": file.name}
