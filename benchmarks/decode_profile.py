"""Where the time of a decode step goes: on a CPU timers around the engine's stages and operations, on a GPU its kernels
as torch's profiler sees them.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch

from nemo_engine import Engine
from nemo_engine.benchmarks.driver import Driver
from nemo_engine.benchmarks.stage_times import StageTimes
from nemo_engine.model.weights import NemoWeights
from nemo_engine.ops import ALL_OPS, Ops
from nemo_engine.ops.op import COMPOSED


def profile_decode(driver: Driver, batch: int, context: int, steps: int) -> dict[str, Any]:
    """{"profile": rows, "profiled_us_per_step": the mean step with timers, "unprofiled_us_per_step": the mean step
    without}.
    """
    plain = statistics.fmean(driver.decode(batch, context, steps).seconds) * 1e6
    runner: Any = driver.engine._core.runner
    if runner._step.model.weights.embed_tokens.is_cuda:
        rows, seconds = kernel_rows(driver, batch, context, steps)
    else:
        stages = StageTimes()
        seconds = sum(driver.decode(batch, context, steps, timed_engine(driver.engine, stages)).seconds)
        rows = stages.rows(steps, seconds)
    return {"profile": rows, "profiled_us_per_step": seconds / steps * 1e6, "unprofiled_us_per_step": plain}


@contextmanager
def timed_engine(engine: Engine, stages: StageTimes) -> Iterator[None]:
    """While it lasts, the engine's stages and every operation have timers."""
    core: Any = engine._core
    runner, scheduler, outputs = core.runner, core.scheduler, engine._outputs
    launch = runner.launch

    def launched(plan: Any) -> Any:
        handle = launch(plan)
        handle.result = stages.wrap("wait for the tokens", handle.result)
        return handle

    ops = timed_ops(runner._step.ops, stages, runner._step.model.weights)
    patches = [
        (scheduler, "schedule", stages.wrap("schedule", scheduler.schedule)),
        (scheduler, "commit", stages.wrap("commit", scheduler.commit)),
        (outputs, "process", stages.wrap("outputs", outputs.process)),
        (runner, "launch", stages.wrap("launch, less the operations", launched)),
        (runner, "_recorded", None),  # a recorded step is one call: its operations run one by one here
        *[
            (owner, name, ops)
            for owner, name in ((runner._step, "ops"), (runner._step.model, "ops"), (runner._sampler, "_ops"))
        ],
    ]
    with ExitStack() as stack:
        for owner, name, value in patches:
            stack.enter_context(patch.object(owner, name, value))
        yield


def timed_ops(ops: Ops, stages: StageTimes, weights: NemoWeights) -> Ops:
    """``ops`` with a timer for each, those also that others are composed of.

    Products are told apart by their weights.
    """
    projections = {weights.lm_head.weight.data_ptr(): "lm_head"}
    for layer in weights.layers:
        for name in ("qkv", "o", "gate_up", "down"):
            projections[getattr(layer, name).weight.data_ptr()] = name

    def product(name: str) -> Any:
        def label(args: tuple[Any, ...]) -> str:
            addresses = [arg.data_ptr() for arg in args if isinstance(arg, torch.Tensor)]
            return next((f"{name} ({projections[each]})" for each in addresses if each in projections), name)

        return label

    timed: dict[str, Any] = {}
    for op in ALL_OPS:
        label = product(op.name) if "linear" in op.name else None
        timed[op.name] = stages.wrap(op.name, getattr(ops, op.name), label)
    for op, choice in zip(ALL_OPS, ops.choices, strict=True):
        if choice.chosen == COMPOSED and op.composed is not None:
            timed[op.name] = functools.partial(op.composed, SimpleNamespace(**timed))
    return dataclasses.replace(ops, **timed)


def kernel_rows(driver: Driver, batch: int, context: int, steps: int) -> tuple[list[dict[str, Any]], float]:
    """(rows of kernels and copies, the longest first; seconds of all steps). Needs a GPU."""
    from torch.profiler import ProfilerActivity, profile

    profiler = profile(activities=[ProfilerActivity.CUDA])
    seconds = sum(driver.decode(batch, context, steps, profiler).seconds)
    rows = [
        {"stage": event.key, "us_per_step": event.self_device_time_total / steps,
         "share": event.self_device_time_total / (seconds * 1e6), "calls_per_step": event.count / steps}
        for event in profiler.key_averages()
        if event.self_device_time_total > 0
    ]  # fmt: skip
    rest = seconds * 1e6 / steps - sum(row["us_per_step"] for row in rows)
    rows.append(
        {
            "stage": "the device is idle",
            "us_per_step": rest,
            "share": rest * steps / (seconds * 1e6),
            "calls_per_step": 0.0,
        }
    )
    return sorted(rows, key=lambda row: -row["us_per_step"]), seconds
