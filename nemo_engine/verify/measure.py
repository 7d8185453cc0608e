"""Four configurations: the reference itself, FP8 weights, FP8 keys and values, and both, token by token against the
first.

Every sequence is prefilled but for its last tokens, which are decode steps, so both kinds of kernel are in what is
measured.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from nemo_engine.checkpoint.inventory import take_inventory
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.checkpoint.progress import progress_bar
from nemo_engine.checkpoint.quant_config import ONLINE
from nemo_engine.model.nemo import Nemo
from nemo_engine.model.sequence import Sequence
from nemo_engine.ops import Ops, Site
from nemo_engine.ops.linear import linear_fp8
from nemo_engine.ops.quantize import FP8
from nemo_engine.runner.precision import resolve_dtype
from nemo_engine.runner.startup import resolve_device
from nemo_engine.verify.material import NUMBERS, Material, material_for

PAGE_SIZE = 64
_DECODED = 16  # tokens at the end of each sequence that are decode steps
_ROWS = 256  # logits that are compared at once
_LARGEST_SURPRISE = 700.0  # nats, whose exponential is a float
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}  # and the names themselves


@dataclass(frozen=True, slots=True)
class Limits:
    """What a configuration may lose against the reference.

    FP8 weights: ``perplexity`` percent of perplexity, and the likeliest token is the same for ``top1`` of all tokens.
    FP8 keys and values: ``kv_perplexity`` percent, and alone the same ``top1``; beside FP8 weights, ``kv_perplexity``
    percent more than those cost.
    """

    perplexity: float = 1.0
    kv_perplexity: float = 0.5
    top1: float = 0.97

    def __post_init__(self) -> None:
        for name, high in (("perplexity", math.inf), ("kv_perplexity", math.inf), ("top1", 1.0)):
            value = getattr(self, name)
            if not (isinstance(value, (int, float)) and 0 <= value <= high and math.isfinite(value)):
                upper = "and finite" if high == math.inf else f"and at most {high:g}"
                raise ValueError(f"limit {name} must be at least 0 {upper}, got {value!r}")


@dataclass(slots=True)
class Measured:
    """One configuration against the reference, over ``num_tokens`` tokens.

    Errors are of logits; KL divergences in nats, of the reference from this; perplexity over the text alone.
    ``retrieval``: {context in tokens: mean log-probability of a number that was named once, far back}. NaN where logits
    were not finite.
    """

    name: str
    num_tokens: int = 0
    max_error: float = math.nan
    mean_error: float = math.nan
    max_kl: float = math.nan
    mean_kl: float = math.nan
    top1: float = math.nan
    perplexity: float = math.nan
    perplexity_change: float = 0.0  # percent
    retrieval: dict[int, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a configuration computed: (2, T, H) of each sequence, on the CPU; and the function that makes logits of
    it.
    """

    states: list[Tensor]
    logits: Callable[[Tensor], Tensor]


def verify(
    model: str | Path,
    *,
    quantization: str = "fp8",
    against: str | Path = "auto",
    device: str = "auto",
    text: str | None = None,
    max_context: int = 2048,
    limits: Limits | None = None,
    prefer: dict[str, str] | None = None,
    revision: str | None = None,
    tokenizer: str | Path | None = None,
) -> list[Measured]:
    """Measure ``model`` in each configuration against the reference: its own dense weights in a dtype, or another
    checkpoint.

    quantization: how an unquantised checkpoint becomes FP8; one that is FP8 is taken as it is, and its dequantised
    weights are the reference unless ``against`` is the checkpoint that it was made of. against: a dtype ("auto": the
    checkpoint's), or a checkpoint. text: for perplexity, in place of the bundled one. max_context: the longest of
    retrieval. tokenizer: its path, if not in the checkpoint; with none at all, words become tokens by a hash. A
    configuration beyond ``limits`` has ``faults``. Raises ``ValueError`` for what cannot be run.
    """
    if quantization not in ONLINE:
        raise ValueError(f"quantization must be one of {', '.join(map(repr, ONLINE))}, got {quantization!r}")
    if max_context < 1:
        raise ValueError(f"max_context must be at least 1, got {max_context}")
    limits = limits or Limits()
    place = resolve_device(device)
    checkpoint = open_checkpoint(model, revision=revision)
    stored = checkpoint.quantization
    if quantization == "fp8_block" and stored is not None and stored.weights not in ("none", "block"):
        raise ValueError(f"quantization 'fp8_block' conflicts with what the checkpoint is already: {stored.describe()}")
    origin, dtype = _reference(checkpoint, against, place)
    name = str(dtype).removeprefix("torch.") + ("" if origin is checkpoint else f" of {origin.path.name}")
    material = material_for(checkpoint, tokenizer, text, max_context)
    network: Nemo | None = None
    with progress_bar("verify", 4 * sum(map(len, material.sequences)), None, unit="tokens") as advance:
        network = _load(checkpoint, quantization, dtype, place, is_fp8=True, prefer=prefer or {})
        scales = [(layer.k_scale, layer.v_scale) for layer in network.weights.layers]
        fp8_weights, both = (_run(network, scales, material, kv_dtype, advance) for kv_dtype in (dtype, FP8))
        network = None  # before the next: they may fill the memory
        network = _load(origin, quantization, dtype, place, is_fp8=False, prefer=prefer or {})
        reference, fp8_kv = (_run(network, scales, material, kv_dtype, advance) for kv_dtype in (dtype, FP8))
    names = (name, "FP8 weights", "FP8 keys and values", "FP8 weights, keys and values")
    results = [
        compare(name, hidden, reference, material, checkpoint.model_config.vocab_size)
        for name, hidden in zip(names, (reference, fp8_weights, fp8_kv, both), strict=True)
    ]
    judge(results, limits)
    return results


def _reference(checkpoint: Checkpoint, against: str | Path, device: torch.device) -> tuple[Checkpoint, torch.dtype]:
    """The checkpoint whose dense weights are the reference, and the dtype of both."""
    dtype = _DTYPES.get(str(against), str(against))
    if dtype == "float64":
        raise ValueError("against must not be 'float64', in which nothing is computed in FP8")
    if dtype == "auto" or dtype in _DTYPES.values():
        return checkpoint, resolve_dtype(dtype, checkpoint.model_config.dtype, device)
    try:
        origin = open_checkpoint(against)
    except (FileNotFoundError, ValueError) as error:
        known = ", ".join(("auto", *_DTYPES, *_DTYPES.values()))
        raise ValueError(f"against must be one of {known}, or a checkpoint: {error}") from None
    for field_name in ("vocab_size", "num_layers", "num_kv_heads", "bos_token_id"):
        ours, theirs = (getattr(each.model_config, field_name) for each in (checkpoint, origin))
        if ours != theirs:
            raise ValueError(
                f"against: {field_name} of {origin.path} must be that of {checkpoint.path}, {ours}, got {theirs}"
            )
    return origin, resolve_dtype("auto", origin.model_config.dtype, device)


def _load(
    checkpoint: Checkpoint,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_fp8: bool,
    prefer: dict[str, str],
) -> Nemo:
    """The checkpoint in FP8, or dense."""
    config, stored = checkpoint.model_config, checkpoint.quantization
    ops = Ops.select(Site.of(config, PAGE_SIZE, dtype, device, FP8), prefer)
    online = ONLINE[quantization] if is_fp8 and (stored is None or stored.weights == "none") else None
    inventory = take_inventory(checkpoint, config, online)
    if not is_fp8:
        inventory = replace(inventory, kinds={})  # dequantised, if it is FP8
    weights = load_weights(
        checkpoint,
        config,
        dtype=dtype,
        device=device,
        inventory=inventory,
        online=online,
        needs_kv_scales=is_fp8,
        is_widened=ops.linear_fp8 is linear_fp8,
    )
    return Nemo(config, weights, ops, config.max_position_embeddings if device.type == "cpu" else 131072)


def _run(
    network: Nemo,
    scales: list[tuple[Tensor | None, Tensor | None]],
    material: Material,
    kv_dtype: torch.dtype,
    advance: Callable[[int], object],
) -> Hidden:
    """All sequences with keys and values of ``kv_dtype``; ``scales`` of theirs, by layer, are for FP8 alone."""
    layers = tuple(
        replace(layer, k_scale=k if kv_dtype == FP8 else None, v_scale=v if kv_dtype == FP8 else None)
        for layer, (k, v) in zip(network.weights.layers, scales, strict=True)
    )
    model = Nemo(network.config, replace(network.weights, layers=layers), network.ops, network.rope.shape[0])
    states = []
    for ids in material.sequences:
        sequence = Sequence(model, len(ids), PAGE_SIZE, kv_dtype)
        prefilled = max(1, len(ids) - _DECODED)
        pieces = [ids[:prefilled], *([token] for token in ids[prefilled:])]
        states.append(torch.cat([sequence.feed(piece) for piece in pieces], 1).cpu())
        advance(len(ids))
    head = Nemo(network.config, replace(network.weights, layers=()), network.ops, 1)  # all that is kept of the weights
    return Hidden(states, Sequence(head, 1, PAGE_SIZE, kv_dtype).logits)


def compare(name: str, hidden: Hidden, reference: Hidden, material: Material, vocab_size: int) -> Measured:
    """Logits of ``hidden`` against those of ``reference``, token by token."""
    measured = Measured(name)
    max_error = max_kl = error_sum = kl_sum = agreed = nll = 0.0
    num_predicted = 0
    num_compared = len(material.prompts) + len(material.texts)
    for index, (ids, ours, theirs) in enumerate(zip(material.sequences, hidden.states, reference.states, strict=True)):
        is_text = len(material.prompts) <= index < num_compared
        if index >= num_compared:
            context, _, count = material.retrieval[index - num_compared]
            logprobs = _logprobs(hidden, ours[:, -count - 1 : -1], ids[-count:])  # NaN, perhaps
            measured.retrieval[context] = measured.retrieval.get(context, 0.0) + float(logprobs.mean()) / len(NUMBERS)
            continue
        for start in range(0, len(ids), _ROWS):
            rows = slice(start, start + _ROWS)
            logits, expected = hidden.logits(ours[:, rows]), reference.logits(theirs[:, rows])
            for whose, values in (("", logits), ("the reference's ", expected)):
                if not values.isfinite().all():
                    return Measured(name, faults=[f"{whose}logits hold NaN or infinity"])
            error = (logits - expected).abs()
            wanted, got = expected.log_softmax(1), logits.log_softmax(1)
            kl = (wanted.exp() * (wanted - got)).sum(1)
            max_error, max_kl = max(max_error, float(error.max())), max(max_kl, float(kl.max()))
            error_sum += float(error.double().sum())
            kl_sum += float(kl.double().sum())
            agreed += int((logits.argmax(1) == expected.argmax(1)).sum())
            measured.num_tokens += len(logits)
            if is_text:
                targets = torch.tensor(ids[start + 1 : start + 1 + _ROWS], device=got.device)
                nll += float(F.nll_loss(got[: len(targets)], targets, reduction="sum"))
                num_predicted += len(targets)
    measured.max_error, measured.max_kl = max_error, max_kl
    measured.mean_error = error_sum / measured.num_tokens / vocab_size
    measured.mean_kl = kl_sum / measured.num_tokens
    measured.top1 = agreed / measured.num_tokens
    surprise = nll / num_predicted
    measured.perplexity = math.exp(surprise) if surprise < _LARGEST_SURPRISE else math.inf
    return measured


def _logprobs(hidden: Hidden, states: Tensor, targets: list[int]) -> Tensor:
    logprobs = hidden.logits(states).log_softmax(1)
    return logprobs.gather(1, torch.tensor(targets, device=logprobs.device).unsqueeze(1))


def judge(results: SequenceOf[Measured], limits: Limits) -> None:
    """Hold each configuration against ``limits``, and write what it exceeds into its faults.

    The first is the reference.
    """
    reference, weights, kv, both = results
    for found, base, limit in (
        (weights, reference, limits.perplexity),
        (kv, reference, limits.kv_perplexity),
        (both, weights, limits.kv_perplexity),
    ):
        found.perplexity_change = 100 * (found.perplexity / reference.perplexity - 1)
        if found.faults:  # nothing was measured
            continue
        change = 100 * (found.perplexity / base.perplexity - 1)
        if not change <= limit:  # NaN is beyond every limit
            found.faults.append(f"perplexity is {change:.2f} % above that of {base.name}, {limit:g} % are allowed")
        if found is not both and not found.top1 >= limits.top1:
            found.faults.append(
                f"the likeliest token is the same for {found.top1:.4f} of all, {limits.top1:g} are needed"
            )
