"""The least time of a step on the device at hand: the planner's roofline over ceilings that were measured in the same
run.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.planner.efficiency import Efficiencies, Figure
from nemo_engine.planner.gpus import Gpu
from nemo_engine.planner.models import PlannedModel, formats_of, read_model
from nemo_engine.planner.roofline import Roofline

if TYPE_CHECKING:
    from nemo_engine.benchmarks.timing import Ceilings


def measured_roofline(folder: Path, model: ModelConfig, config: EngineConfig, ceilings: Ceilings) -> Roofline:
    """The roofline of ``model`` as ``config`` runs it: every weight, key and value is read once, products are at the
    device's best rate.
    """
    return roofline_of(replace(read_model(str(folder)), config=model), config, ceilings)


def roofline_of(model: PlannedModel, config: EngineConfig, ceilings: Ceilings) -> Roofline:
    """The same for a model that the planner knows."""
    device = Gpu(
        "here", "the device at hand", 0, 0.0, "", ceilings.bytes_per_s, ceilings.bf16_flops_per_s,
        ceilings.fp8_flops_per_s, 1.0, "measured in the same run",
    )  # fmt: skip
    whole = Figure(1.0, "the ceiling itself is measured")
    efficiencies = replace(Efficiencies().ideal(), memory=whole, matmul_bf16=whole, matmul_fp8=whole)
    return Roofline.of(model.config, formats_of(model, config), device, efficiencies)


def decode_bytes(roofline: Roofline, batch: int, context: float) -> float:
    """Bytes that a step must read in which ``batch`` requests of ``context`` tokens decode."""
    return roofline.linear_bytes + roofline.head_bytes + batch * context * roofline.kv_bytes_per_token


def decode_seconds(roofline: Roofline, batch: int, context: float) -> float:
    """The least time of such a step."""
    rows, per_token = roofline.decode_line(batch)
    return rows + batch * context * per_token


def prefill_seconds(roofline: Roofline, batch: int, num_in: int) -> float:
    """The least time until ``batch`` prompts of ``num_in`` tokens have their first token."""
    return roofline.step_seconds(0, 0, [(0, num_in)] * batch)
