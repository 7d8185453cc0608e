"""Published results of others beside the prediction of ``roofline`` for the same case: the error of the model.

The results are TensorRT-LLM's, with all requests waiting from the start (a well-tuned engine under full load), and
those of single requests. None is of this engine, and none of Mistral NeMo, for which no such table was found; the
models are of its kind. The efficiencies that are called derived come from these results, so the errors of other cases
may be larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median

from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.memory_plan import plan_kv_cache
from nemo_engine.planner.efficiency import Efficiencies
from nemo_engine.planner.gpus import find_gpu
from nemo_engine.planner.models import BUILT_IN, COMMON, PlannedModel, formats_of
from nemo_engine.planner.plan import Load, operating
from nemo_engine.planner.roofline import Roofline

_MOST = 2048  # requests at a time, the default of trtllm-bench
_STEP_TOKENS = 8192  # of a step, likewise
_MODELS = {
    "Llama 3.1 8B": ModelConfig(
        vocab_size=128256, hidden_size=4096, num_layers=32, max_position_embeddings=131072, **COMMON
    ),
    "Mistral 7B": BUILT_IN["mistral-7b-v0.3"],
}
_V1 = "TensorRT-LLM 1.0, docs/source/performance/perf-overview.md at 00f37686: total output throughput"
_V015 = "TensorRT-LLM 0.15.0, docs/source/performance/perf-overview.md: token throughput"
_SHAPES = (
    (128, 128), (128, 2048), (128, 4096), (500, 2000), (1000, 1000), (2048, 128), (2048, 2048), (5000, 500),
    (20000, 2000),
)  # fmt: skip
# (model, GPU, whether weights and KV cache are FP8, source, output tokens/s by shape)
_TABLES: tuple[tuple[str, str, bool, str, tuple[float, ...]], ...] = (
    ("Llama 3.1 8B", "h200", True, _V1,
     (27911, 26221, 18027, 20770, 17744, 3538, 12194, 3902, 1804)),
    ("Llama 3.1 8B", "h100", True, _V1,
     (28312, 22714, 14325, 17660, 15220, 3450, 9305, 3459, 1351)),
    ("Llama 3.1 8B", "h100", False, _V015,
     (16116.63, 9894.49, 5758.98, 7953.1, 7721.07, 1972.07, 4370.61, 1802.2, 621.58)),
    ("Llama 3.1 8B", "a100", False, _V015,
     (6552.62, 5220.03, 3326.45, 4191.62, 3753.46, 789.56, 2366.86, 816.09, 330.47)),
    ("Llama 3.1 8B", "l40s", True, _V015,
     (8982.97, 5297.21, 2989.17, 4263.97, 4013.95, 1055.55, 2162.8, 972.2, 326.02)),
    ("Mistral 7B", "h100", True, _V015,
     (30177.4, 22060.45, 13773.03, 17229.29, 15428.87, 3546.44, 9118.64, 3493.52, 1267.96)),
    ("Mistral 7B", "a100", False, _V015,
     (6968.4, 5556.98, 3430.11, 4339.77, 3874.65, 793.57, 2440.45, 828.17, 334.06)),
    ("Mistral 7B", "l40s", True, _V015,
     (9526.7, 5669.19, 3091.88, 4498.74, 4118.6, 1067.47, 2231.66, 999.35, 336.18)),
)  # fmt: skip
# (model, GPU, whether weights are FP8, source, seconds of a decode step of one request with little context)
_STEPS = (
    ("Llama 3.1 8B", "h100", False, "vLLM 0.19, vLLM's blog of 2026-04-22: intercept of ITL", 6.44e-3),
    ("Llama 3.1 8B", "h100", True, "NVIDIA NIM 1.0.0, performance page: ITL at concurrency 1, GPU inferred", 4.6e-3),
)  # fmt: skip
_PROMPTS_DOMINATE = 0.4  # of the time


@dataclass(frozen=True, slots=True)
class Case:
    """A published result and the model's, in output tokens/s. ``prompt_share``: the part of the time for prompts."""

    model: str
    gpu: str
    is_fp8: bool
    source: str
    what: str
    published: float
    predicted: float
    prompt_share: float

    @property
    def error(self) -> float:
        """The relative error, above 0 where the model promises too much."""
        return self.predicted / self.published - 1

    @property
    def is_of_prompts(self) -> bool:
        """Whether prompts dominate."""
        return self.prompt_share > _PROMPTS_DOMINATE


@cache
def comparison() -> tuple[Case, ...]:
    """Every published result beside the model's, which uses the assumed efficiencies and no measurement."""
    return (*_steps(), *_throughputs())


def _setting(model: str, gpu_name: str, is_fp8: bool) -> tuple[EngineConfig, int, Roofline, Roofline]:
    gpu, shape = find_gpu(gpu_name), _MODELS[model]
    formats_wanted = {"quantization": "fp8", "kv_cache_dtype": "fp8"} if is_fp8 else {}
    longest = max(sum(each) for each in _SHAPES)
    sizes = {"max_num_seqs": _MOST, "max_num_batched_tokens": _STEP_TOKENS, "max_model_len": longest}
    config = EngineConfig(**sizes, **formats_wanted)  # type: ignore[arg-type]
    formats = formats_of(PlannedModel(model, shape), config)
    num_pages, _, _ = plan_kv_cache(shape, config, formats.sizes, gpu.free_bytes)
    efficiencies = Efficiencies.assumed(gpu)
    rooflines = (Roofline.of(shape, formats, gpu, each) for each in (efficiencies, efficiencies.ideal()))
    return config, num_pages, *rooflines  # type: ignore[return-value]


def _throughputs() -> Iterator[Case]:
    for model, gpu, is_fp8, source, rates in _TABLES:
        config, num_pages, roofline, ideal = _setting(model, gpu, is_fp8)
        for (num_in, num_out), rate in zip(_SHAPES, rates, strict=True):
            batch = min(_MOST, num_pages // -(-(num_in + num_out) // config.page_size))
            point = operating(roofline, ideal, Load(num_in, num_out), batch, config)
            share = min(1.0, roofline.step_seconds(0, 0, [(0, num_in)]) * point.requests_per_s)
            yield Case(model, gpu, is_fp8, source, f"{num_in} in, {num_out} out", rate, point.tokens_per_s, share)


def _steps() -> Iterator[Case]:
    for model, gpu, is_fp8, source, seconds in _STEPS:
        _, _, roofline, _ = _setting(model, gpu, is_fp8)
        yield Case(model, gpu, is_fp8, source, "one request", 1 / seconds, 1 / roofline.step_seconds(1, 1, ()), 0.0)


def error_line(gpu: str) -> str:
    """One line on how far the model is from the published results: those on ``gpu`` if there are any, else all."""
    of_gpu = [case for case in comparison() if case.gpu == gpu]
    cases = of_gpu or comparison()
    parts = []
    for name, of_prompts in (("where decoding dominates", False), ("where prompts do", True)):
        errors = [case.error for case in cases if case.is_of_prompts is of_prompts]
        if errors:
            parts.append(f"{min(errors):+.0%} to {max(errors):+.0%} (median {median(errors):+.0%}) {name}")
    others = f"on {', '.join(dict.fromkeys(case.gpu for case in cases))}"
    place = "on this GPU" if of_gpu else f"{others}, none on this GPU" if gpu else others
    return f"against {len(cases)} published results {place}, promised throughput is off by {', '.join(parts)}"


def table(cases: Sequence[Case]) -> str:
    """A line for each case."""
    rows = [("model", "GPU", "", "load", "published", "here", "error", "prompts")]
    for case in cases:
        rows.append((
            case.model, case.gpu, "fp8" if case.is_fp8 else "bf16", case.what, f"{case.published:,.0f}",
            f"{case.predicted:,.0f}", f"{case.error:+.0%}", f"{case.prompt_share:.0%}",
        ))  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in rows]
    return "\n".join([*lines, *(f"  {source}" for source in dict.fromkeys(case.source for case in cases))])
