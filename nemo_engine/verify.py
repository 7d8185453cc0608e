"""How far FP8 is from the reference, measured: logits, KL divergence, top-1 agreement, perplexity, and retrieval at growing context.

Four configurations of one checkpoint: the reference itself, FP8 weights, FP8 keys and values, and both. Every sequence is prefilled but for
its last tokens, which are decode steps, so both kinds of kernel are in what is measured.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_engine.model.checkpoint import Checkpoint, open_checkpoint
from nemo_engine.model.inventory import take_inventory
from nemo_engine.model.loading import load_weights
from nemo_engine.model.nemo import Nemo
from nemo_engine.model.progress import progress_bar
from nemo_engine.model.quantization import ONLINE
from nemo_engine.model.sequence import Sequence
from nemo_engine.ops import Ops, Site
from nemo_engine.ops.linear import linear_fp8
from nemo_engine.ops.quantize import FP8
from nemo_engine.runner.precision import resolve_dtype
from nemo_engine.runner.startup import resolve_device
from nemo_engine.text import Tokenizer, load_tokenizer

ASSETS = Path(__file__).parent / "assets" / "verify"
PAGE_SIZE = 64
_DECODED = 16  # tokens at the end of each sequence that are decode steps
_TEXT_TOKENS = 2048  # of the text that are one sequence
_ROWS = 256  # logits that are compared at once
_FIRST_CONTEXT = 512  # of retrieval, then doubled
_NEEDLE = "The number of the archive is {}.\n"
_QUESTION = "The number of the archive is"
_NUMBERS = ("70419", "38265", "91537")


@dataclass(frozen=True, slots=True)
class Limits:
    """What a configuration may lose against the reference.

    FP8 weights: ``perplexity`` percent of perplexity, and the likeliest token is the same for ``top1`` of all tokens. FP8 keys and values:
    ``kv_perplexity`` percent, and alone the same ``top1``; beside FP8 weights, ``kv_perplexity`` percent more than those cost.
    """

    perplexity: float = 1.0
    kv_perplexity: float = 0.5
    top1: float = 0.97


@dataclass(slots=True)
class Measured:
    """One configuration against the reference, over ``num_tokens`` tokens.

    Errors are of logits; KL divergences in nats, of the reference from this; perplexity over the text alone. ``retrieval``: {context in
    tokens: mean log-probability of a number that was named once, far back}.
    """

    name: str
    num_tokens: int = 0
    max_error: float = 0.0
    mean_error: float = 0.0
    max_kl: float = 0.0
    mean_kl: float = 0.0
    top1: float = 0.0
    perplexity: float = 0.0
    perplexity_change: float = 0.0  # percent
    retrieval: dict[int, float] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Hidden:
    """What a configuration computed: (2, T, H) of each sequence, on the CPU; and the function that makes logits of it."""

    states: list[Tensor]
    logits: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Material:
    """Token ids: of prompts and of the text, and of retrieval with the number's tokens at the end."""

    prompts: list[list[int]]
    texts: list[list[int]]
    retrieval: list[tuple[int, list[int], int]]  # context, ids, tokens of the number

    @property
    def sequences(self) -> list[list[int]]:
        """All of them."""
        return [*self.prompts, *self.texts, *(ids for _, ids, _ in self.retrieval)]


def verify(
    model: str | Path,
    *,
    quantization: str = "fp8",
    against: str = "auto",
    device: str = "auto",
    text: str | None = None,
    max_context: int = 2048,
    limits: Limits | None = None,
    prefer: dict[str, str] | None = None,
    revision: str | None = None,
) -> list[Measured]:
    """Measure ``model`` in each configuration against the reference in dtype ``against`` ("auto": the checkpoint's).

    quantization: how an unquantised checkpoint becomes FP8; one that is FP8 is taken as it is, and its dequantised weights are the
    reference. text: for perplexity, in place of the bundled one. max_context: the longest of retrieval. A configuration beyond ``limits`` has ``faults``. Raises ``ValueError`` for what cannot be run.
    """
    if quantization not in ONLINE:
        raise ValueError(f"quantization must be one of {', '.join(map(repr, ONLINE))}, got {quantization!r}")
    if max_context < 1:
        raise ValueError(f"max_context must be at least 1, got {max_context}")
    place = resolve_device(device)
    checkpoint = open_checkpoint(model, revision=revision)
    tokenizer = load_tokenizer(checkpoint.path)
    if tokenizer is None:
        raise ValueError(f"{checkpoint.path} has no tokenizer, which verification needs")
    dtype = resolve_dtype(against, checkpoint.model_config.dtype, place)
    if dtype == torch.float64:
        raise ValueError("against must not be 'float64', in which nothing is computed in FP8")
    config = checkpoint.model_config
    limit = min(max_context, config.max_position_embeddings)
    material = make_material(tokenizer, text, limit, config.bos_token_id)

    def run(*, is_fp8: bool) -> list[Hidden]:
        network = _load(checkpoint, quantization, dtype, place, is_fp8=is_fp8, prefer=prefer or {})
        return [_run(network, material, kv_dtype, advance) for kv_dtype in (dtype, FP8)]

    with progress_bar("verify", 4 * sum(map(len, material.sequences)), None, unit="tokens") as advance:
        reference, fp8_kv = run(is_fp8=False)
        fp8_weights, both = run(is_fp8=True)
    names = (str(dtype).removeprefix("torch."), "FP8 weights", "FP8 keys and values", "FP8 weights, keys and values")
    results = [
        compare(name, hidden, reference, material, config.vocab_size)
        for name, hidden in zip(names, (reference, fp8_weights, fp8_kv, both), strict=True)
    ]
    judge(results, limits or Limits())
    return results


def make_material(tokenizer: Tokenizer, text: str | None, max_context: int, bos: int | None) -> Material:
    """The stored prompts, the text in pieces, and numbers to be found at growing context."""
    begin = [] if bos is None else [bos]
    prompts = [
        [*begin, *tokenizer.encode(prompt, bos=False)] for prompt in json.loads((ASSETS / "prompts.json").read_text())
    ]
    filler = tokenizer.encode((ASSETS / "text.txt").read_text(encoding="utf-8"), bos=False)
    ids = filler if text is None else tokenizer.encode(text, bos=False)
    size = _TEXT_TOKENS - len(begin)
    texts = [[*begin, *ids[start : start + size]] for start in range(0, len(ids), size)]
    if len(ids) < 2:
        raise ValueError(f"text must have at least 2 tokens, got {len(ids)}")
    retrieval = []
    context = _FIRST_CONTEXT
    while context <= max_context:
        for number in _NUMBERS:
            needle, question = (tokenizer.encode(part, bos=False) for part in (_NEEDLE.format(number), _QUESTION))
            answer = tokenizer.encode(f"{_QUESTION} {number}", bos=False)[len(question) :]
            room = context - len(begin) - len(needle) - len(question) - len(answer)
            around = (filler * (room // len(filler) + 1))[:room]
            before = len(around) // 3
            retrieval.append(
                (context, [*begin, *around[:before], *needle, *around[before:], *question, *answer], len(answer))
            )
        context *= 2
    return Material(prompts, texts, retrieval)


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
    config = checkpoint.model_config
    ops = Ops.select(Site.of(config, PAGE_SIZE, dtype, device, FP8), prefer)
    online = ONLINE[quantization] if is_fp8 and checkpoint.quantization is None else None
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
        needs_kv_scales=True,
        is_widened=ops.linear_fp8 is linear_fp8,
    )
    return Nemo(config, weights, ops, config.max_position_embeddings if device.type == "cpu" else 131072)


def _run(network: Nemo, material: Material, kv_dtype: torch.dtype, advance: Callable[[int], object]) -> Hidden:
    """All sequences with keys and values of ``kv_dtype``."""
    plain = network
    if kv_dtype != FP8 and network.weights.layers[0].k_scale is not None:  # scales are for FP8 alone
        layers = tuple(replace(layer, k_scale=None, v_scale=None) for layer in network.weights.layers)
        plain = Nemo(network.config, replace(network.weights, layers=layers), network.ops, network.rope.shape[0])
    states = []
    sequence = None
    for ids in material.sequences:
        sequence = Sequence(plain, len(ids), PAGE_SIZE, kv_dtype)
        prefilled = max(1, len(ids) - _DECODED)
        pieces = [ids[:prefilled], *([token] for token in ids[prefilled:])]
        states.append(torch.cat([sequence.feed(piece) for piece in pieces], 1).cpu())
        advance(len(ids))
    assert sequence is not None
    return Hidden(states, sequence.logits)


def compare(name: str, hidden: Hidden, reference: Hidden, material: Material, vocab_size: int) -> Measured:
    """Logits of ``hidden`` against those of ``reference``, token by token."""
    found = Measured(name)
    error_sum = kl_sum = agreed = nll = 0.0
    num_predicted = 0
    num_compared = len(material.prompts) + len(material.texts)
    for index, (ids, ours, theirs) in enumerate(zip(material.sequences, hidden.states, reference.states, strict=True)):
        is_text = len(material.prompts) <= index < num_compared
        if index >= num_compared:
            context, _, count = material.retrieval[index - num_compared]
            logprobs = _logprobs(hidden, ours[:, -count - 1 : -1], ids[-count:])
            found.retrieval[context] = found.retrieval.get(context, 0.0) + float(logprobs.mean()) / len(_NUMBERS)
            continue
        for start in range(0, len(ids), _ROWS):
            rows = slice(start, start + _ROWS)
            logits, expected = hidden.logits(ours[:, rows]), reference.logits(theirs[:, rows])
            if not logits.isfinite().all():
                found.faults.append("logits hold NaN or infinity")
                return found
            error = (logits - expected).abs()
            wanted, got = expected.log_softmax(1), logits.log_softmax(1)
            kl = (wanted.exp() * (wanted - got)).sum(1)
            found.max_error = max(found.max_error, float(error.max()))
            found.max_kl = max(found.max_kl, float(kl.max()))
            error_sum += float(error.double().sum())
            kl_sum += float(kl.double().sum())
            agreed += int((logits.argmax(1) == expected.argmax(1)).sum())
            found.num_tokens += len(logits)
            if is_text:
                targets = torch.tensor(ids[start + 1 : start + 1 + _ROWS], device=got.device)
                nll += float(F.nll_loss(got[: len(targets)], targets, reduction="sum"))
                num_predicted += len(targets)
    found.mean_error = error_sum / found.num_tokens / vocab_size
    found.mean_kl = kl_sum / found.num_tokens
    found.top1 = agreed / found.num_tokens
    found.perplexity = math.exp(nll / num_predicted)
    return found


def _logprobs(hidden: Hidden, states: Tensor, targets: list[int]) -> Tensor:
    logprobs = hidden.logits(states).log_softmax(1)
    return logprobs.gather(1, torch.tensor(targets, device=logprobs.device).unsqueeze(1))


def judge(results: SequenceOf[Measured], limits: Limits) -> None:
    """Hold each configuration against ``limits``, and write what it exceeds into its faults. The first is the reference."""
    reference, weights, kv, both = results
    for found, base, limit in (
        (weights, reference, limits.perplexity),
        (kv, reference, limits.kv_perplexity),
        (both, weights, limits.kv_perplexity),
    ):
        if found.faults or base.faults:
            continue
        found.perplexity_change = 100 * (found.perplexity / reference.perplexity - 1)
        change = 100 * (found.perplexity / base.perplexity - 1)
        if change > limit:
            found.faults.append(f"perplexity is {change:.2f} % above that of {base.name}, {limit:g} % are allowed")
        if found is not both and found.top1 < limits.top1:
            found.faults.append(
                f"the likeliest token is the same for {found.top1:.4f} of all, {limits.top1:g} are needed"
            )


def report(results: SequenceOf[Measured]) -> str:
    """A table, a configuration a line, and what is beyond the limits."""
    contexts = list(results[0].retrieval)
    heads = ["configuration", "max error", "mean error", "max KL", "mean KL", "top-1", "perplexity", "change",
             *(f"found at {context}" for context in contexts)]  # fmt: skip
    rows = [heads]
    for found in results:
        rows.append([
            found.name, f"{found.max_error:.3f}", f"{found.mean_error:.4f}", f"{found.max_kl:.4f}", f"{found.mean_kl:.5f}",
            f"{found.top1:.4f}", f"{found.perplexity:.3f}", f"{found.perplexity_change:+.2f} %",
            *(f"{found.retrieval[context]:.2f}" for context in contexts),
        ])  # fmt: skip
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    lines = [
        "  ".join(
            cell.ljust(width) if not column else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths))
        )
        for row in rows
    ]
    lines.append(
        f"over {results[0].num_tokens} tokens; found at: mean log-probability of a number named once in a context of that many"
    )
    lines += [f"FAILED {found.name}: {fault}" for found in results for fault in found.faults]
    return "\n".join(lines)


def as_json(results: SequenceOf[Measured], facts: dict[str, Any]) -> str:
    """What ``verify`` found, with ``facts`` about the run."""
    return json.dumps(facts | {"configurations": [asdict(found) for found in results]}, indent=2) + "\n"


def plot(results: SequenceOf[Measured], path: Path) -> None:
    """Change of perplexity, disagreement, KL divergence and retrieval, as PNG or SVG by the name of ``path``. Needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(16, 4), layout="constrained")
    names = [found.name for found in results[1:]]
    for axis, title, values in (
        (axes[0], "perplexity, change in %", [found.perplexity_change for found in results[1:]]),
        (axes[1], "top-1 disagreement, %", [100 * (1 - found.top1) for found in results[1:]]),
        (axes[2], "mean KL divergence, nats", [found.mean_kl for found in results[1:]]),
    ):
        axis.bar(range(len(names)), values, tick_label=[name.replace(", ", ",\n") for name in names])
        axis.set_title(title)
        axis.tick_params(axis="x", labelsize=7)
    for found in results:
        axes[3].plot(list(found.retrieval), list(found.retrieval.values()), marker="o", label=found.name)
    axes[3].set_title("log-probability of a number named once")
    axes[3].set_xlabel("context, tokens")
    axes[3].set_xscale("log", base=2)
    axes[3].legend(fontsize=7)
    figure.savefig(path)
    pyplot.close(figure)
