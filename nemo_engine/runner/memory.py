"""What a GPU's memory goes to, planned item by item before anything is allocated; and what would fit if it does not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.runner.graphs import graph_sizes

GIB = 1 << 30
_RESERVE = 2 * GIB  # fragments, library workspaces, and what other processes take while this one runs
_GRAPH_BYTES = 24 << 20  # of one captured step beside its outputs: its nodes and their parameters
_SAMPLING_BYTES_PER_LOGIT = 16  # the logits, their fp32 copy where they are edited, and the candidates of a cut


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes of everything that a device will hold, of ``free`` ones."""

    free: int
    weights: int
    activations: int  # of the largest step
    tables: int  # requests, sampling parameters, token counts, rotary table
    graphs: int
    reserve: int
    kv_cache: int

    @property
    def total(self) -> int:
        """Bytes of all items."""
        return self.weights + self.activations + self.tables + self.graphs + self.reserve + self.kv_cache

    def format(self) -> str:
        """A table in GiB, an item a line."""
        items = [
            ("weights", self.weights),
            ("activations of the largest step", self.activations),
            ("request tables", self.tables),
            ("CUDA graphs", self.graphs),
            ("reserve", self.reserve),
            ("KV cache", self.kv_cache),
            ("together", self.total),
            ("free on the device", self.free),
        ]
        return "\n".join(f"  {name:<32}{num_bytes / GIB:9.2f} GiB" for name, num_bytes in items)


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

    kv_pages: as many as are wanted, or None for all that the other items leave. weight_bytes: None for unquantised weights. kv_itemsize: of
    the KV cache, None for ``itemsize``.
    """
    hidden, inner, tokens = model.hidden_size, model.intermediate_size, config.max_num_batched_tokens
    vocab, seqs = model.vocab_size, config.max_num_seqs
    if weight_bytes is None:
        weight_bytes = itemsize * num_parameters(model)
    # At the MLP: residual, x and the norm's result, gate_up and its product. The logits come when that is freed.
    layer = tokens * itemsize * (3 * hidden + 3 * inner + 2 * model.q_size + 2 * model.kv_size)
    sampling = max(seqs, 256) * vocab * _SAMPLING_BYTES_PER_LOGIT
    pages_per_row = -(-max_model_len // config.page_size)
    tables = (seqs + 1) * (4 * max_model_len + 8 * pages_per_row + 5 * vocab) + max_model_len * model.head_dim * 4
    graphs = 0
    if not config.enforce_eager:
        sizes = graph_sizes(seqs)
        graphs = sum(sizes) * vocab * itemsize + 2 * _GRAPH_BYTES * len(sizes)
    plan = MemoryPlan(
        free=free,
        weights=weight_bytes,
        activations=max(layer, sampling),
        tables=tables,
        graphs=graphs,
        reserve=_RESERVE,
        kv_cache=0,
    )
    page_bytes = config.page_size * model.kv_bytes_per_token(kv_itemsize or itemsize)
    if kv_pages is None:
        kv_pages = max(0, (free - plan.total) // page_bytes - 1)
    return replace(plan, kv_cache=(kv_pages + 1) * page_bytes)  # and the page of padding


def num_parameters(model: ModelConfig) -> int:
    """Numbers in the weights; a tied head counts once."""
    hidden, inner = model.hidden_size, model.intermediate_size
    layer = hidden * (model.q_size + 2 * model.kv_size) + model.q_size * hidden + 3 * hidden * inner + 2 * hidden
    heads = 1 if model.tie_word_embeddings else 2
    return model.num_layers * layer + heads * model.vocab_size * hidden + hidden


def what_would_fit(
    model: ModelConfig,
    config: EngineConfig,
    max_model_len: int,
    itemsize: int,
    free: int,
    weight_bytes: int | None = None,
    kv_itemsize: int | None = None,
) -> str:
    """One line: the longest context at this batch size, and the largest batch at this context, that ``free`` bytes hold.

    A batch counts as held if one request of the whole context fits beside what the batch size costs.
    """

    def fits(length: int, seqs: int) -> bool:
        tokens = max(seqs, min(config.max_num_batched_tokens, length))
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
