"""What a device's memory goes to, planned item by item before anything is allocated; and what would fit if it does not.

Start-up sizes the engine by these functions, and ``nemo-engine plan`` shows what they say: there is one plan. Must not
know torch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from nemo_engine.checkpoint.inventory import KindOf
from nemo_engine.checkpoint.quant_config import BLOCK
from nemo_engine.config import MAX_GRAPH_TOKENS, WIDE_STEP_TOKENS, EngineConfig, ModelConfig, resolve_max_model_len

GIB = 1 << 30
CPU_KV_GIB = 1.0  # by default; more if one request of the whole context needs it, up to CPU_KV_GIB_MOST
CPU_KV_GIB_MOST = 4.0
_RESERVE = 2 * GIB  # fragments, libraries' code, and what other processes take while this one runs
_GRAPH_BYTES = 26 << 20  # of one captured step beside its tensors: its nodes and their parameters, 2 MiB of its end
# Beyond the last, the GPU takes longer than the host for its launches.
_MIXED_GRAPH_TOKENS = (64, 128, 256, 512, 768, MAX_GRAPH_TOKENS)
_GRAPH_FRAGMENTS = 192 << 20  # segments of the graphs' memory pool that are not full, and its split-K parts
# torch gives each pair of a cuBLAS handle and a stream 32 MiB on Hopper (8 MiB before). A thread has a handle of its
# own: there are the pairs of start-up's thread with its stream and with the captures', and that of the thread that
# serves.
_CUBLAS_WORKSPACES = 3 * (32 << 20)
_WIDENED_BYTES = 256 << 20  # what prefill attention in CUDA widens of an FP8 cache at once: ops/cuda/prefill.py
_SAMPLING_BYTES_PER_LOGIT = 16  # the logits, their fp32 copy where they are edited, and the candidates of a cut

_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Bytes of one number of the activations and of the KV cache, and of all weights (None: unquantised ones)."""

    activations: int
    kv_cache: int
    weights: int | None = None


class DoesNotFitError(ValueError):
    """The plan needs ``missing`` bytes more than there are. The message has the plan and what would fit."""

    def __init__(self, message: str, missing: int) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of everything that a device will hold, of ``free`` ones."""

    free: int
    weights: int
    activations: int  # of the largest step
    tables: int  # requests, sampling parameters, token counts, rotary table
    graphs: int
    cublas: int  # its workspaces
    reserve: int
    kv_cache: int

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return self.weights + self.activations + self.tables + self.graphs + self.cublas + self.reserve + self.kv_cache

    @property
    def missing(self) -> int:
        """Bytes that the device is short of; 0 if all fits."""
        return max(0, self.total - self.free)

    def items(self) -> list[tuple[str, int]]:
        """Names and bytes."""
        return [
            ("weights", self.weights),
            ("activations of the largest step", self.activations),
            ("request tables", self.tables),
            ("CUDA graphs", self.graphs),
            ("cuBLAS workspaces", self.cublas),
            ("reserve", self.reserve),
            ("KV cache", self.kv_cache),
            ("together", self.total),
            ("free on the device", self.free),
        ]

    def format(self) -> str:
        """A table in GiB, an item a line."""
        return "\n".join(f"  {name:<32}{num_bytes / GIB:9.2f} GiB" for name, num_bytes in self.items())


def plan_memory(
    model: ModelConfig,
    config: EngineConfig,
    max_model_len: int,
    itemsize: int,
    free: int,
    kv_pages: int | None,
    weight_bytes: int | None = None,
    kv_itemsize: int | None = None,
) -> MemoryPlan:
    """The plan of a device with ``free`` bytes for an engine whose activations take ``itemsize`` bytes each.

    kv_pages: as many as are wanted, or None for all that the other items leave. weight_bytes: None for unquantised
    weights. kv_itemsize: of the KV cache, None for ``itemsize``.
    """
    hidden, inner, tokens = model.hidden_size, model.intermediate_size, config.tokens_per_step
    vocab, seqs = model.vocab_size, config.max_num_seqs
    if weight_bytes is None:
        weight_bytes = itemsize * num_parameters(model)
    # At the MLP: residual, x and the norm's result, gate_up and its product. The logits come when that is freed.
    token_bytes = itemsize * (3 * hidden + 3 * inner + 2 * model.q_size + 2 * model.kv_size)
    sampling = max(seqs, 256) * vocab * _SAMPLING_BYTES_PER_LOGIT
    pages_per_row = -(-max_model_len // config.page_size)
    tables = (seqs + 1) * (4 * max_model_len + 8 * pages_per_row + 5 * vocab) + max_model_len * model.head_dim * 4
    graphs = 0
    if not config.enforce_eager:
        # Each size keeps the logits of its rows that sample. What a step needs meanwhile is used again by all others:
        # that of the largest is enough.
        mixed = mixed_graph_sizes(config)
        sizes = [*graph_sizes(seqs), *[rows for rows, _ in wide_graph_sizes(config)], *mixed]
        logits = sum(sizes) - sum(mixed) + sum([min(seqs, tokens) for tokens in mixed])
        graphs = logits * vocab * itemsize + max(sizes) * token_bytes
        graphs += _GRAPH_FRAGMENTS + _GRAPH_BYTES * len(sizes)
    plan = MemoryPlan(
        free=free,
        weights=weight_bytes,
        activations=max(tokens * token_bytes, sampling)
        + widened_bytes(model, seqs + 1, pages_per_row, config.page_size, kv_itemsize),
        tables=tables,
        graphs=graphs,
        cublas=_CUBLAS_WORKSPACES,
        reserve=_RESERVE,
        kv_cache=0,
    )
    page_bytes = config.page_size * model.kv_bytes_per_token(kv_itemsize or itemsize)
    if kv_pages is None:
        kv_pages = max(0, (free - plan.total) // page_bytes - 1)
    return replace(plan, kv_cache=(kv_pages + 1) * page_bytes)  # and the page of padding


def widened_bytes(model: ModelConfig, slots: int, pages_per_row: int, page_size: int, kv_itemsize: int | None) -> int:
    """Bytes in which prefill attention in CUDA widens pages of an FP8 cache to bf16, kept from the first prompt on; 0
    of another cache.

    At most ``_WIDENED_BYTES``, or one KV head of one row if that is more.
    """
    if kv_itemsize != 1:
        return 0
    head = 2 * 2 * page_size * model.head_dim  # of a page, K and V
    return max(pages_per_row * head, min(_WIDENED_BYTES, slots * pages_per_row * model.num_kv_heads * head))


def num_parameters(model: ModelConfig) -> int:
    """Numbers in the weights; a tied head counts once."""
    hidden, inner = model.hidden_size, model.intermediate_size
    layer = hidden * (model.q_size + 2 * model.kv_size) + model.q_size * hidden + 3 * hidden * inner + 2 * hidden
    heads = 1 if model.tie_word_embeddings else 2
    return model.num_layers * layer + heads * model.vocab_size * hidden + hidden


def weight_bytes(model: ModelConfig, itemsize: int, kind_of: KindOf) -> int:
    """Bytes of all weights and their scales, ``itemsize`` of each number that is not FP8.

    A tied dense head is no memory of its own.
    """

    def linear(layer: int | None, projection: str, rows: int, width: int) -> int:
        kind = kind_of(layer, projection)
        if kind.scales == "none":
            return itemsize * rows * width
        scales = rows if kind.scales == "channel" else -(-rows // BLOCK) * -(-width // BLOCK)
        return rows * width + 4 * (scales + kind.has_input_scale)

    hidden, inner, vocab = model.hidden_size, model.intermediate_size, model.vocab_size
    total = itemsize * (vocab * hidden + hidden + 2 * hidden * model.num_layers)
    for layer in range(model.num_layers):
        total += linear(layer, "qkv", model.q_size + 2 * model.kv_size, hidden)
        total += linear(layer, "o", hidden, model.q_size)
        total += linear(layer, "gate_up", 2 * inner, hidden)
        total += linear(layer, "down", hidden, inner)
    is_shared = model.tie_word_embeddings and kind_of(None, "lm_head").scales == "none"
    return total + (0 if is_shared else linear(None, "lm_head", vocab, hidden))


def graph_sizes(max_num_seqs: int) -> tuple[int, ...]:
    """The batch sizes that are captured.

    A batch is padded to the next: by at most 1/3 from 24 rows on, 64 rows from 256 on.
    """
    sizes = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256]
    sizes += range(320, max_num_seqs + 64, 64)
    return tuple([size for size in sizes if size < max_num_seqs] + [max_num_seqs])


def wide_graph_sizes(config: EngineConfig) -> tuple[tuple[int, int], ...]:
    """The wide steps that are captured: rows of one token, and width."""
    max_rows = min(config.max_num_seqs, WIDE_STEP_TOKENS)
    return tuple(
        (size * width, width)
        for width in config.widths
        for size in graph_sizes(min(max_rows, WIDE_STEP_TOKENS // width))
    )


def mixed_graph_sizes(config: EngineConfig) -> tuple[int, ...]:
    """The steps with prompts that are captured, in tokens: one is padded to the next, larger ones run eagerly."""
    largest = config.tokens_per_step
    sizes = [size for size in _MIXED_GRAPH_TOKENS if size < largest]
    return tuple(sizes if largest > _MIXED_GRAPH_TOKENS[-1] else [*sizes, largest])


def what_would_fit(
    model: ModelConfig,
    config: EngineConfig,
    max_model_len: int,
    itemsize: int,
    free: int,
    weight_bytes: int | None = None,
    kv_itemsize: int | None = None,
) -> str:
    """One line: the longest context at this batch size, and the largest batch at this context, that ``free`` bytes
    hold.

    A batch counts as held if one request of the whole context fits beside what the batch size costs.
    """

    def fits(length: int, seqs: int) -> bool:
        tokens = max(seqs, min(config.tokens_per_step, length))
        smaller = replace(
            config, max_num_seqs=seqs, max_num_batched_tokens=tokens, num_kv_pages=None, kv_cache_gib=None
        )
        pages = -(-length // config.page_size)
        return plan_memory(model, smaller, length, itemsize, free, pages, weight_bytes, kv_itemsize).total <= free

    def largest(high: int, holds: Callable[[int], bool]) -> int:
        low = 0
        while low < high:
            middle = (low + high + 1) // 2
            if holds(middle):
                low = middle
            else:
                high = middle - 1
        return low

    context = largest(max_model_len, lambda length: fits(length, config.max_num_seqs))
    batch = largest(config.max_num_seqs, lambda seqs: fits(max_model_len, seqs))
    if context == 0 and batch == 0:
        return "no context fits at any batch size: the weights and the reserve alone are too much"
    parts = []
    if context:
        parts.append(f"max_model_len {context} at max_num_seqs {config.max_num_seqs}")
    if batch:
        parts.append(f"max_num_seqs {batch} at max_model_len {max_model_len}")
    return "what would fit: " + ", or ".join(parts)


def plan_kv_cache(
    model: ModelConfig, config: EngineConfig, sizes: Sizes, free: int | None
) -> tuple[int, int, MemoryPlan | None]:
    """The number of KV pages, ``max_model_len``, and on a GPU with ``free`` bytes what its memory goes to.

    An explicit ``max_model_len`` that the KV budget cannot hold is refused with the arithmetic; without one, the
    context is cut to what fits. So is a budget that the device cannot hold beside everything else.
    """
    wanted = resolve_max_model_len(model, config)
    token_bytes = model.kv_bytes_per_token(sizes.kv_cache)
    page_bytes = token_bytes * config.page_size
    num_pages: int | None = None
    if config.num_kv_pages is not None:
        num_pages = config.num_kv_pages
    elif config.kv_cache_gib is not None:
        num_pages = int(config.kv_cache_gib * GIB) // page_bytes
        if num_pages == 0:
            raise ValueError(
                f"kv_cache_gib must hold at least one page of {config.page_size} tokens ({page_bytes} bytes), "
                f"got {config.kv_cache_gib}"
            )
    elif free is None:
        whole = wanted * token_bytes / GIB
        num_pages = int((max(CPU_KV_GIB, whole) if whole <= CPU_KV_GIB_MOST else CPU_KV_GIB_MOST) * GIB) // page_bytes
    memory = None
    if free is not None:
        memory = plan_memory(model, config, wanted, sizes.activations, free, num_pages, sizes.weights, sizes.kv_cache)
        num_pages = memory.kv_cache // page_bytes - 1
        if memory.missing or num_pages == 0:
            missing = memory.missing + (page_bytes if num_pages == 0 else 0)
            reason = f"the plan does not fit into the device's memory, by {_size_up(missing)}"
            raise DoesNotFitError(memory_message(reason, memory, model, config, wanted, sizes), missing)
    assert num_pages is not None
    capacity = num_pages * config.page_size
    if wanted <= capacity:
        return num_pages, wanted, memory
    missing = (-(-wanted // config.page_size) - num_pages) * page_bytes
    arithmetic = (
        f"a context of {wanted} tokens needs {_size_up(wanted * token_bytes)} of KV cache ({token_bytes} bytes per "
        "token), "
        f"and {num_pages} pages of {config.page_size} tokens ({_size_up(num_pages * page_bytes)}) hold {capacity}: "
        f"{_size_up(missing)} are missing"
    )
    if isinstance(config.max_model_len, int):
        reason = (
            f"max_model_len {wanted} does not fit: {arithmetic}; set max_model_len to at most {capacity} or 'auto', "
            "or raise kv_cache_gib or num_kv_pages"
        )
        message = reason if memory is None else memory_message(reason, memory, model, config, wanted, sizes)
        raise DoesNotFitError(message, missing)
    if capacity == 0:
        raise DoesNotFitError(f"no memory for the KV cache: {arithmetic}", missing)
    _logger.info("max_model_len is %d: %s", capacity, arithmetic)
    return num_pages, capacity, memory


def memory_message(
    reason: str, memory: MemoryPlan, model: ModelConfig, config: EngineConfig, max_model_len: int, sizes: Sizes
) -> str:
    """``reason``, the plan, and what would fit."""
    fitting = what_would_fit(
        model, config, max_model_len, sizes.activations, memory.free, sizes.weights, sizes.kv_cache
    )
    return f"{reason}\n{memory.format()}\n{fitting}"


def _size_up(num_bytes: int) -> str:
    """A size with two digits behind the point, rounded up: with so many more it fits.

    Below a tenth of a GiB in MiB, then KiB.
    """
    unit, name = next(
        ((1 << b, n) for b, n in ((30, "GiB"), (20, "MiB")) if num_bytes * 10 >= 1 << b), (1 << 10, "KiB")
    )
    return f"{-(-num_bytes * 100 // unit) / 100:.2f} {name}"
