"""A plan: the memory that a model needs on a GPU, item by item; what fits; the speed to expect; and the largest load
within given limits.

Times come from ``roofline``, for a steady state without a queue; the simulator has queues.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from nemo_engine.config import EngineConfig, ModelConfig, resolve_max_model_len
from nemo_engine.memory_plan import DoesNotFitError, MemoryPlan, Sizes, plan_kv_cache, plan_memory, weight_bytes
from nemo_engine.planner.drafts import NO_DRAFTS, Acceptance, wide_rates
from nemo_engine.planner.efficiency import Efficiencies
from nemo_engine.planner.gpus import GPUS, Gpu
from nemo_engine.planner.models import Formats, PlannedModel, formats_of
from nemo_engine.planner.roofline import Roofline
from nemo_engine.workload import Limits

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True, slots=True)
class Operating:
    """The times that each of ``batch`` always running requests of one shape sees, and the rate of all. Seconds."""

    batch: int
    ttft: float  # mean, without a queue
    itl: float  # mean over all steps, also those with other prompts in them
    longest_itl: float  # in a step with a whole chunk of a prompt in it
    step: float  # a step with decode rows alone
    ideal_step: float  # the roofline of that step
    tokens_per_s: float  # output
    requests_per_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """The shape of the requests, and limits. Tokens and seconds; ``price_per_hour`` of one GPU, in ``currency``."""

    input_tokens: int
    output_tokens: int
    limits: Limits = Limits()
    price_per_hour: float | None = None
    currency: str = ""

    def __post_init__(self) -> None:
        for name in ("input_tokens", "output_tokens"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        price = self.price_per_hour
        if price is not None and not 0 < price < float("inf"):
            raise ValueError(f"price_per_hour must be finite and greater than 0, got {price}")


@dataclass(frozen=True, slots=True)
class Plan:
    """The result. ``memory`` is per GPU.

    If ``shortage`` is set, the model does not fit: it says why, and what would fit. The fields below are then empty.
    """

    model: PlannedModel
    gpu: Gpu
    config: EngineConfig
    formats: Formats
    efficiencies: Efficiencies
    tensor_parallel_size: int
    memory: MemoryPlan
    kv_bytes_per_token: int  # per GPU
    shortage: DoesNotFitError | None
    max_model_len: int
    num_pages: int
    load: Load
    largest_batch: int  # requests of the load that the cache holds at once, at most max_num_seqs
    points: tuple[Operating, ...]
    wide: dict[int, dict[int, float]]  # output tokens/s by batch and width; empty without speculation
    best: Operating | None  # the largest batch within the limits; None if none is, or there are no limits

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the KV cache holds."""
        return self.num_pages * self.config.page_size

    def cost_per_million(self, point: Operating) -> float | None:
        """The price of a million output tokens, in the currency of the price."""
        price = self.load.price_per_hour
        return None if price is None else price * self.tensor_parallel_size / (point.tokens_per_s * 3600) * 1e6


def shard(model: ModelConfig, ranks: int) -> ModelConfig:
    """The share of ``model`` that one of ``ranks`` GPUs has. Raises ``ValueError`` if it cannot be divided so."""
    if ranks < 1:
        raise ValueError(f"tensor_parallel_size must be at least 1, got {ranks}")
    for name in ("num_heads", "intermediate_size", "vocab_size"):
        if getattr(model, name) % ranks:
            raise ValueError(f"tensor_parallel_size must divide {name} ({getattr(model, name)}), got {ranks}")
    kv_heads = model.num_kv_heads
    if kv_heads % ranks and ranks % kv_heads:
        raise ValueError(
            f"tensor_parallel_size must divide num_kv_heads ({kv_heads}) or be a multiple of it, got {ranks}"
        )
    return replace(
        model,
        num_heads=model.num_heads // ranks,
        num_kv_heads=max(1, kv_heads // ranks),
        intermediate_size=model.intermediate_size // ranks,
    )


def make_plan(
    model: PlannedModel,
    gpu: Gpu,
    config: EngineConfig,
    load: Load,
    efficiencies: Efficiencies | None = None,
    tensor_parallel_size: int = 1,
    acceptance: Acceptance = NO_DRAFTS,
) -> Plan:
    """Plan ``model`` on ``gpu``. acceptance: of drafts, if ``config`` has speculation.

    Raises ``ValueError`` for options that conflict. A model that does not fit gives a plan that says so.
    """
    efficiencies = efficiencies or Efficiencies.assumed(gpu)
    ranks = tensor_parallel_size
    rank_model, formats, sizes = _per_gpu(model, config, ranks)
    roofline = Roofline.of(model.config, formats, gpu, efficiencies, ranks)
    ideal = Roofline.of(model.config, formats, gpu, efficiencies.ideal(), ranks)
    shortage, num_pages, max_model_len = None, 0, 0
    try:
        num_pages, max_model_len, planned = plan_kv_cache(rank_model, config, sizes, gpu.free_bytes)
        assert planned is not None
        memory = planned
    except DoesNotFitError as error:
        shortage = error
        memory = _paper_memory(rank_model, config, sizes, gpu)
    total = load.input_tokens + load.output_tokens
    if shortage is None and total > max_model_len:
        raise ValueError(
            f"input {load.input_tokens} and output {load.output_tokens} make {total} tokens: more than the context of "
            f"{max_model_len}"
        )
    largest = min(config.max_num_seqs, num_pages // -(-(total - 1) // config.page_size)) if shortage is None else 0
    points = [operating(roofline, ideal, load, batch, config) for batch in range(1, largest + 1)]
    meeting = [point for point in points if load.limits.are_kept(point.ttft, point.itl)]
    return Plan(
        model=model, gpu=gpu, config=config, formats=formats, efficiencies=efficiencies, tensor_parallel_size=ranks,
        memory=memory, kv_bytes_per_token=rank_model.kv_bytes_per_token(sizes.kv_cache), shortage=shortage,
        max_model_len=max_model_len, num_pages=num_pages, load=load, largest_batch=largest,
        wide=wide_rates(
            roofline, acceptance, config, int(load.input_tokens + (load.output_tokens + 1) / 2),
            sorted({batch for batch in (*_BATCHES, largest) if 0 < batch <= largest}) if config.widths else (),
        ),
        points=tuple(point for point in points if point.batch in (*_BATCHES, largest)),
        best=meeting[-1] if meeting and load.limits != Limits() else None,
    )  # fmt: skip


def _paper_memory(model: ModelConfig, config: EngineConfig, sizes: Sizes, gpu: Gpu) -> MemoryPlan:
    """The items of a plan that does not fit, with a cache of one page or of the size that was asked for."""
    page_bytes = config.page_size * model.kv_bytes_per_token(sizes.kv_cache)
    pages = config.num_kv_pages
    if config.kv_cache_gib is not None:
        pages = int(config.kv_cache_gib * (1 << 30)) // page_bytes
    length = resolve_max_model_len(model, config)
    if pages is None and isinstance(config.max_model_len, int):
        pages = -(-length // config.page_size)
    return plan_memory(
        model, config, length, sizes.activations, gpu.free_bytes, pages, sizes.weights, sizes.kv_cache
    )  # fmt: skip


def alternatives(plan: Plan) -> list[str]:
    """The changes, each of one thing (FP8 or the GPU), that would make the model fit."""
    options = []
    changes: list[dict[str, str]] = []
    if plan.config.quantization is None and not plan.formats.kinds:
        changes.append({"quantization": "fp8"})
    if not plan.formats.is_kv_fp8:
        changes.append({"kv_cache_dtype": "fp8"})
    if len(changes) == 2:
        changes.append({**changes[0], **changes[1]})
    ranks = plan.tensor_parallel_size
    if plan.gpu.fp8_flops_per_s is not None:
        for change in changes:
            if _fits(plan.model, plan.gpu, replace(plan.config, **change), ranks):  # type: ignore[arg-type]
                options.append(", ".join(f"{name}={value}" for name, value in change.items()))
    others = [gpu for gpu in GPUS.values() if gpu.memory_gib > plan.gpu.memory_gib]
    for gpu in sorted(others, key=lambda gpu: gpu.memory_gib):
        usable = gpu.fp8_flops_per_s is not None or not (plan.formats.kinds or plan.formats.is_kv_fp8)
        if usable and _fits(plan.model, gpu, plan.config, ranks):
            options.append(gpu.title)
    return options


def _fits(model: PlannedModel, gpu: Gpu, config: EngineConfig, ranks: int) -> bool:
    rank_model, _, sizes = _per_gpu(model, config, ranks)
    try:
        plan_kv_cache(rank_model, config, sizes, gpu.free_bytes)
    except DoesNotFitError:
        return False
    return True


def _per_gpu(model: PlannedModel, config: EngineConfig, ranks: int) -> tuple[ModelConfig, Formats, Sizes]:
    """One GPU's share of the model, the formats, and the bytes of its weights. Embeddings and head are divided too, and
    logits are gathered.
    """
    formats = formats_of(model, config)
    rank_model, sizes = shard(model.config, ranks), formats.sizes
    if ranks > 1:
        divided = replace(rank_model, vocab_size=rank_model.vocab_size // ranks)
        sizes = Sizes(sizes.activations, sizes.kv_cache, weight_bytes(divided, sizes.activations, formats.kind_of))
    return rank_model, formats, sizes


def operating(roofline: Roofline, ideal: Roofline, load: Load, batch: int, config: EngineConfig) -> Operating:
    """The times of ``batch`` requests that run all the time: one that ends is replaced by the next.

    While one decodes, the others' prompts are computed in its steps, (batch - 1) / output of them per step on average.
    A new request waits for half a step, then for the steps that its prompt takes. The host plans while the GPU
    computes, unless ``pipeline_depth`` is 1.
    """
    num_in, num_out = load.input_tokens, load.output_tokens
    context = int(batch * (num_in + (num_out + 1) / 2))
    host = roofline.host_seconds(batch)
    device = roofline.step_seconds(batch, context, ())
    is_serial = config.steps_in_flight("cuda") == 1
    step = device + host if is_serial else max(device, host)
    room = config.tokens_per_step - (batch - 1)
    chunks = [(start, min(room, num_in - start)) for start in range(0, num_in, room)]
    others = context * (batch - 1) // batch
    mixed = [roofline.step_seconds(batch - 1, others, [chunk]) for chunk in chunks]
    without = roofline.step_seconds(batch - 1, others, ()) if batch > 1 else 0.0
    itl = step + (batch - 1) / num_out * sum(seconds - without for seconds in mixed)
    ttft = host + sum(mixed) + (0.5 * step if batch > 1 else 0.0)
    rate = batch / (ttft + (num_out - 1) * itl)
    return Operating(
        batch=batch, ttft=ttft, itl=itl, longest_itl=max(itl, *mixed) if batch > 1 else step, step=step,
        ideal_step=ideal.step_seconds(batch, context, ()), tokens_per_s=rate * num_out, requests_per_s=rate,
    )  # fmt: skip
