"""nemo_engine: an inference engine for Mistral NeMo.

Importing this costs nothing: each name below is imported from its module when it is first used, so the configuration
and the output types come without torch, and torch without the text libraries.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_engine.config import EngineConfig, ModelConfig
    from nemo_engine.engine.async_engine import AsyncEngine, EngineClosedError, EngineDeadError
    from nemo_engine.engine.engine import Engine
    from nemo_engine.outputs import CompletionOutput, Logprob, RequestMetrics, RequestOutput
    from nemo_engine.sampling_params import RepetitionDetection, RequestOutputKind, SamplingParams
    from nemo_engine.structured_outputs import StructuredOutputsParams

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "CompletionOutput",
    "Engine",
    "EngineClosedError",
    "EngineConfig",
    "EngineDeadError",
    "Logprob",
    "ModelConfig",
    "RepetitionDetection",
    "RequestMetrics",
    "RequestOutput",
    "RequestOutputKind",
    "SamplingParams",
    "StructuredOutputsParams",
    "__version__",
]

_MODULES = {
    "AsyncEngine": "engine.async_engine",
    "CompletionOutput": "outputs",
    "Engine": "engine.engine",
    "EngineClosedError": "engine.async_engine",
    "EngineDeadError": "engine.async_engine",
    "EngineConfig": "config",
    "Logprob": "outputs",
    "ModelConfig": "config",
    "RepetitionDetection": "sampling_params",
    "RequestMetrics": "outputs",
    "RequestOutput": "outputs",
    "RequestOutputKind": "sampling_params",
    "SamplingParams": "sampling_params",
    "StructuredOutputsParams": "structured_outputs",
}


def __getattr__(name: str) -> Any:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
