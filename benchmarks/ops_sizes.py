"""Inputs of every operation at a model's sizes, and what torch and its libraries compute from the same.

Attention is measured as the second and later layers of a step run it: what a step computes once for all layers is not
in its time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from nemo_engine.benchmarks.models import SHAPES, open_model
from nemo_engine.benchmarks.timing import Args, Calls, Size, on_device
from nemo_engine.config import ModelConfig
from nemo_engine.ops import Op
from nemo_engine.ops.attention import AttentionMeta, gather_row
from nemo_engine.ops.paged_kv import PagedKV
from nemo_engine.ops.rope import RopeMeta, rope_table

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
PAGE_SIZE = 64


def read_shape(name: str) -> ModelConfig:
    """The shape of a checkpoint's config.json."""
    return ModelConfig.from_hf(json.loads((open_model(name).path / "config.json").read_text()))


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the inputs are."""

    model: ModelConfig
    rows: tuple[int, ...]
    products: tuple[int, ...]  # rows of a linear layer's input
    decodes: tuple[tuple[int, int], ...]  # requests, tokens of each
    mixed: tuple[tuple[int, int], ...]  # the same, of one step
    prefills: tuple[tuple[int, int], ...]  # queries, keys
    batches: tuple[int, ...]  # requests that sample


SCALES = {
    "nemo": Scale(
        SHAPES["nemo"],
        (1, 64, 256, 4096),
        (1, 16, 64, 128, 256, 4096),
        ((1, 1024), (1, 32768), (1, 131072), (32, 4096), (8, 32768), (64, 1024), (256, 1024)),
        ((32, 1024), (1, 131072), (32, 1024)),
        ((2048, 2048), (8192, 8192), (32768, 32768), (8192, 32768)),
        (1, 64, 256),
    ),
    # What a CPU runs: the bundled model's shape, as the benchmarks of the whole engine load it.
    "nemo-tiny": Scale(
        read_shape("nemo-tiny"),
        (1, 16, 64, 1024),
        (1, 16, 64, 1024),
        ((1, 128), (1, 2048), (16, 256), (64, 256)),
        ((32, 128), (1, 2048), (32, 128)),
        ((128, 128), (1024, 1024), (256, 1024)),
        (1, 16, 64),
    ),
    "tiny": Scale(SHAPES["tiny"], (1, 5), (1, 5), ((3, 128),), ((2, 64), (1, 128)), ((64, 64), (32, 96)), (2,)),
}


def bf16(*shape: int, device: torch.device) -> Tensor:
    """Normal noise."""
    return torch.randn(shape, device=device).to(BF16)


def definition(op: Op) -> Callable[..., Calls]:
    """The baseline of operations that torch composes of its own: the definition itself."""
    return lambda *args: {"torch": lambda: op.semantics(*args)}


def norm_sizes(op: Op, scale: Scale, device: torch.device) -> Iterator[Size]:
    """With the residual, as in 80 of NeMo's 81 norms."""
    width = scale.model.hidden_size

    def make(rows: int) -> Args:
        x, residual = (bf16(rows, width, device=device) for _ in range(2))
        args = x, bf16(width, device=device), 1e-5, residual
        return (*args, None) if op.name == "rms_norm_fp8" else args

    for rows in scale.rows:
        yield Size(f"{rows}x{width} residual", partial(make, rows), definition(op))


def row_sizes(op: Op, scale: Scale, device: torch.device) -> Iterator[Size]:
    """Operations of one matrix."""
    inner, hidden = scale.model.intermediate_size, scale.model.hidden_size
    tail: Args = () if op.name == "silu_mul" else (None,)
    for width in [hidden, inner] if op.name == "quantize_tokens" else [2 * inner]:
        for rows in scale.rows:
            make = partial(lambda rows, width: (bf16(rows, width, device=device), *tail), rows, width)
            yield Size(f"{rows}x{width}", make, definition(op))


def rope_sizes(op: Op, scale: Scale, device: torch.device) -> Iterator[Size]:
    """Decode rows write to a page each; more rows are a prompt, which fills its pages."""
    model = scale.model
    heads, kv_heads, dim = model.num_heads, model.num_kv_heads, model.head_dim

    def make(rows: int, kv_dtype: torch.dtype) -> Args:
        q, k, v = (bf16(rows, count, dim, device=device) for count in (heads, kv_heads, kv_heads))
        shape = (rows + 2, kv_heads, PAGE_SIZE, dim)
        caches = [torch.zeros(shape, dtype=kv_dtype, device=device) for _ in range(2)]
        scales = [torch.ones(kv_heads, device=device) if kv_dtype is FP8 else None for _ in range(2)]
        places = PAGE_SIZE + torch.arange(rows, device=device) * (1 if rows > 256 else PAGE_SIZE)
        positions = torch.arange(rows, device=device) % model.max_position_embeddings
        table = rope_table(dim, model.rope_theta, model.max_position_embeddings, device)
        return q, k, v, PagedKV(*caches, *scales), RopeMeta(table, positions, places)

    for rows in scale.rows:
        for name, dtype in (("bf16", BF16), ("fp8", FP8)):
            site = {"kv_dtype": FP8 if dtype is FP8 else None}
            yield Size(f"{rows} tokens, {name} KV", partial(make, rows, dtype), definition(op), site=site)


def attention_sizes(op: Op, scale: Scale, device: torch.device) -> Iterator[Size]:
    """Decoding requests of equal lengths and of mixed ones, then one prompt or one chunk of it.

    Pages are in random order.
    """
    model = scale.model

    def make(queries: int, lengths: list[int], kv_dtype: torch.dtype) -> Args:
        requests, width = len(lengths), -(-max(lengths) // PAGE_SIZE)
        counts = [-(-length // PAGE_SIZE) for length in lengths]
        shape = (sum(counts) + 1, model.num_kv_heads, PAGE_SIZE, model.head_dim)
        caches = [bf16(*shape, device=device).to(kv_dtype) for _ in range(2)]
        scales = [torch.ones(model.num_kv_heads, device=device) if kv_dtype is FP8 else None for _ in range(2)]
        table = torch.zeros(requests + 1, width, dtype=torch.int64, device=device)
        pages = (1 + torch.randperm(sum(counts), device=device)).split(counts)
        for row, row_pages in enumerate(pages):
            table[row + 1, : len(row_pages)] = row_pages
        meta = AttentionMeta(
            num_decodes=requests if queries == 1 else 0,
            query_start_loc=torch.arange(requests + 1, device=device) * queries,
            seq_lens=torch.tensor(lengths, device=device),
            page_table=table,
            slot_ids=torch.arange(1, requests + 1, device=device),
            page_size=PAGE_SIZE,
            num_pages=width,
            longest=queries,
        )
        q = bf16(requests * queries, model.num_heads, model.head_dim, device=device)
        return q, PagedKV(*caches, *scales), meta, model.head_dim**-0.5

    kinds = [(f"decode {n}x{keys}", 1, [keys] * n) for n, keys in scale.decodes]
    kinds += [
        (
            f"decode {'+'.join(f'{n}x{keys}' for n, keys in scale.mixed)}",
            1,
            [k for n, k in scale.mixed for _ in range(n)],
        )
    ]
    kinds += [(f"prefill {queries} of {keys}", queries, [keys]) for queries, keys in scale.prefills]
    for name, queries, lengths in kinds:
        for label, dtype in (("bf16", BF16), ("fp8", FP8)):
            site = {"kv_dtype": FP8 if dtype is FP8 else None}
            baselines = sdpa_calls if len(set(lengths)) == 1 else sdpa_row_calls
            yield Size(f"{name}, {label} KV", partial(make, queries, lengths, dtype), baselines, site=site)


def sdpa_calls(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Calls:
    """torch's SDPA over contiguous bf16 keys and values.

    For decodes also with a KV head's query heads as its queries.
    """
    pages = meta.page_table[meta.slot_ids]
    keys = int(meta.seq_lens[0])
    k, v = (  # (R, Hk, L, D); gathered as bytes, because FP8 cannot be
        x.view(torch.uint8)[pages].view(x.dtype).to(BF16).transpose(1, 2).flatten(2, 3)[:, :, :keys] for x in kv.caches
    )
    requests, (heads, dim) = pages.shape[0], q.shape[1:]
    options: dict[str, dict[str, Any]] = {}
    if meta.num_decodes:
        queries = {" gqa": q.view(requests, heads, 1, dim), " packed": q.view(requests, k.shape[1], -1, dim)}
        options = {" gqa": {"enable_gqa": True}, " packed": {}}
    else:
        queries = {"": q.transpose(0, 1).unsqueeze(0)}
        is_whole = q.shape[0] == keys
        mask = {"is_causal": True} if is_whole else {"attn_mask": causal_lower_right(q.shape[0], keys)}
        options = {"": {"enable_gqa": True, **mask}}
    backends = {"flash": [SDPBackend.FLASH_ATTENTION], "cudnn": [SDPBackend.CUDNN_ATTENTION]}
    if q.device.type == "cpu":
        backends = {"any": [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION]}

    def call(backend: str, form: str) -> Tensor:
        with sdpa_kernel(backends[backend]):
            out = F.scaled_dot_product_attention(queries[form], k, v, scale=scale, **options[form])
        return out if meta.num_decodes else out[0].transpose(0, 1)

    return {f"sdpa {backend}{form}": partial(call, backend, form) for backend in backends for form in queries}


def sdpa_row_calls(q: Tensor, kv: PagedKV, meta: AttentionMeta, scale: float) -> Calls:
    """torch's SDPA over the contiguous bf16 keys and values of one decode row after the other: lengths differ."""
    rows = list(zip(meta.page_table[meta.slot_ids], meta.seq_lens.tolist(), strict=True))
    k, v = (
        [gather_row(cache.view(torch.uint8), pages, keys).view(cache.dtype).to(BF16)[None] for pages, keys in rows]
        for cache in kv.caches
    )
    queries = q.view(len(rows), 1, kv.num_heads, -1, q.shape[2])
    each = partial(F.scaled_dot_product_attention, scale=scale)
    return {"sdpa by row": lambda: torch.cat([each(*row) for row in zip(queries, k, v, strict=True)]).view(q.shape)}


def linear_sizes(op: Op, scale: Scale, device: torch.device) -> Iterator[Size]:
    """The five projections. FP8 with a scale per token and per output channel."""
    model = scale.model
    shapes = {
        "qkv": (model.q_size + 2 * model.kv_size, model.hidden_size),
        "o": (model.hidden_size, model.q_size),
        "gate_up": (2 * model.intermediate_size, model.hidden_size),
        "down": (model.hidden_size, model.intermediate_size),
        "lm_head": (model.vocab_size, model.hidden_size),
    }
    is_fp8 = op.name == "linear_fp8"

    def make(rows: int, n: int, k: int) -> Args:
        x, w = bf16(rows, k, device=device), bf16(n, k, device=device)
        if not is_fp8:
            return x, w
        return x.to(FP8), torch.rand(rows, 1, device=device) + 0.5, w.to(FP8), torch.rand(n, 1, device=device) + 0.5

    def scaled_mm(x: Tensor, x_scales: Tensor, w: Tensor, w_scales: Tensor) -> Calls:
        def call(fast: bool) -> Tensor:
            scales = {"scale_a": x_scales, "scale_b": w_scales.t()}
            return torch._scaled_mm(x, w.t(), **scales, out_dtype=BF16, use_fast_accum=fast)

        return {"_scaled_mm": partial(call, True), "_scaled_mm precise": partial(call, False)}

    for name, (n, k) in shapes.items():
        for rows in scale.products:
            baselines = scaled_mm if is_fp8 else lambda x, w: {"F.linear": lambda: F.linear(x, w)}
            yield Size(f"{name} {rows}x{k}x{n}", partial(make, rows, n, k), baselines)


def fused_sizes(op: Op, scale: Scale, device: torch.device) -> Iterator[Size]:
    """Linear layers with what comes before them, against the same composed in torch.

    FP8 with scales per token and channel.
    """
    model = scale.model
    hidden, inner = model.hidden_size, model.intermediate_size
    qkv, gate_up, down = (model.q_size + 2 * model.kv_size, hidden), (2 * inner, hidden), (hidden, inner)
    shapes = {"norm_linear": {"qkv": qkv, "gate_up": gate_up}, "silu_mul_linear": {"down": down}}
    base, is_fp8 = op.name.removesuffix("_fp8"), op.name.endswith("_fp8")

    def weights(n: int, k: int) -> Args:
        weight = bf16(n, k, device=device)
        return (weight.to(FP8), torch.rand(n, 1, device=device) + 0.5, None) if is_fp8 else (weight,)

    def make(rows: int, n: int, k: int) -> Args:
        if base == "silu_mul_linear":
            return bf16(rows, 2 * k, device=device), *weights(n, k)
        x, residual = (bf16(rows, k, device=device) for _ in range(2))
        last = (weights(n, k), weights(k, n // 2)) if base == "mlp" else weights(n, k)
        return x, residual, bf16(k, device=device), 1e-5, *last

    for name, (n, k) in shapes.get(base, {"mlp": gate_up}).items():
        for rows in scale.products:
            yield Size(f"{name} {rows}x{k}x{n}", partial(make, rows, n, k), definition(op))


def sample_sizes(op: Op, scale: Scale, device: torch.device) -> Iterator[Size]:
    """Batches of one kind of row, without penalties. Tokens are not comparable: each has its own noise."""
    vocab = scale.model.vocab_size
    kinds = {"greedy": (0.0, vocab, 1.0), "plain": (0.8, vocab, 1.0), "top_k 50, top_p 0.9": (0.8, 50, 0.9)}

    def make(rows: int, temperature: float, top_k: int, top_p: float) -> Args:
        from nemo_engine.ops.sample import SlotParams

        def per_slot(value: float, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.full((rows + 1,), value, dtype=dtype, device=device)

        params = SlotParams(
            temperature=per_slot(temperature),
            min_p=per_slot(0.0),
            top_k=per_slot(top_k, torch.int64),
            top_p=per_slot(top_p),
            seed_keys=torch.randint(-(1 << 62), 1 << 62, (rows + 1,), device=device),
            frequency=per_slot(0.0),
            presence=per_slot(0.0),
            repetition=per_slot(1.0),
            output_counts=torch.zeros(rows + 1, vocab, dtype=torch.int32, device=device),
            prompt_mask=torch.zeros(rows + 1, vocab, dtype=torch.bool, device=device),
        )
        slots = torch.arange(1, rows + 1, device=device)
        return 3 * bf16(rows, vocab, device=device), slots, 1000 + slots, params, None

    for rows in scale.batches:
        for name, (temperature, top_k, top_p) in kinds.items():
            baselines = partial(sort_calls, temperature=temperature, top_k=top_k, top_p=top_p)
            yield Size(f"{rows}x{vocab} {name}", partial(make, rows, temperature, top_k, top_p), baselines, False)


def sort_calls(logits: Tensor, *rest: Any, temperature: float, top_k: int, top_p: float) -> Calls:
    """Sampling as it is composed in torch: argmax, exponential noise, a sort for the filters."""

    def draw(masses: Tensor) -> Tensor:
        return (masses / torch.empty_like(masses).exponential_()).argmax(dim=1)

    def filtered() -> Tensor:
        values, ids = (logits.float() / temperature).sort(dim=1, descending=True)
        values[:, top_k:] = -torch.inf
        masses = values.softmax(dim=1)
        masses.masked_fill_(masses.cumsum(dim=1) - masses > top_p, 0.0)
        return ids.gather(1, draw(masses).unsqueeze(1))

    if temperature == 0.0:
        return {"argmax": lambda: logits.argmax(dim=1)}
    if top_k == logits.shape[1]:
        return {"softmax": lambda: draw((logits.float() / temperature).softmax(dim=1))}
    return {"sort": filtered}


def logprob_sizes(op: Op, scale: Scale, device: torch.device) -> Iterator[Size]:
    """The chosen token and 5 more."""
    vocab, best = scale.model.vocab_size, 5

    def make(rows: int) -> Args:
        return 3 * bf16(rows, vocab, device=device), torch.randint(vocab, (rows,), device=device), best

    def calls(logits: Tensor, chosen: Tensor, k: int) -> Calls:
        def composed() -> tuple[Tensor, ...]:
            values = logits.float().log_softmax(dim=1)
            named = values.gather(1, chosen.unsqueeze(1))
            return (*values.topk(k, dim=1), (values >= named).sum(dim=1))

        return {"log_softmax, topk": composed}

    for rows in scale.batches:
        yield Size(f"{rows}x{vocab} top {best}", partial(make, rows), calls, False)


def batch_sizes(op: Op, scale: Scale, device: torch.device) -> Iterator[Size]:
    """Decode rows, each fourth of which takes a new page."""
    model = scale.model
    max_len = model.max_position_embeddings

    def make(rows: int) -> Args:
        slots = 1 + torch.randperm(rows, device=device)
        num_computed = torch.randint(1, max_len - 1, (rows + 1,), device=device)
        return (
            torch.randint(model.vocab_size, (rows + 1, max_len), dtype=torch.int32, device=device),
            num_computed,
            torch.randint(1, 1 << 20, (rows + 1, max_len // PAGE_SIZE), device=device),
            slots,
            torch.arange(rows + 1, device=device),
            num_computed[slots] // PAGE_SIZE,
            torch.where(slots % 4 == 0, slots, -1),
            PAGE_SIZE,
            rows,
            1,
        )

    for rows in scale.batches:
        yield Size(f"{rows} decodes", partial(make, rows), definition(op))


SIZES: dict[str, Callable[[Op, Scale, torch.device], Iterator[Size]]] = {
    "rms_norm": norm_sizes,
    "rms_norm_fp8": norm_sizes,
    "rope_and_append_kv_": rope_sizes,
    "paged_attention": attention_sizes,
    "silu_mul": row_sizes,
    "silu_mul_fp8": row_sizes,
    "linear": linear_sizes,
    "linear_fp8": linear_sizes,
    **dict.fromkeys(
        ("norm_linear", "norm_linear_fp8", "silu_mul_linear", "silu_mul_linear_fp8", "mlp_fp8"), fused_sizes
    ),
    "quantize_tokens": row_sizes,
    "sample_": sample_sizes,
    "top_logprobs": logprob_sizes,
    "build_batch_": batch_sizes,
}


def sizes_of(op: Op, scale: Scale, device: torch.device) -> Iterator[Size]:
    """The sizes of ``op``: those of the table, else its last case, which is the largest or most general."""
    if op.name in SIZES:
        yield from SIZES[op.name](op, scale, device)
    else:
        case = list(op.cases())[-1]
        yield Size(f"case {case.name}", lambda: on_device(case.make(BF16), device), definition(op), False, case.site)
