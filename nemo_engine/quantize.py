"""An FP8 checkpoint from an unquantised one: reads it, calibrates on text if static scales are wanted, and writes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemo_engine.checkpoint.calibration import PAGE_SIZE, Calibration, calibrate
from nemo_engine.checkpoint.checkpoint import Checkpoint, open_checkpoint
from nemo_engine.checkpoint.export import KVScales, Scheme, check_wanted, export_fp8
from nemo_engine.checkpoint.inventory import take_inventory
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.checkpoint.progress import progress_bar
from nemo_engine.ops import Ops, Site
from nemo_engine.runner.precision import resolve_dtype
from nemo_engine.runner.startup import resolve_device
from nemo_engine.text import load_tokenizer

_CHUNK = 2048  # tokens of text that are one request


def quantize_checkpoint(
    model: str | Path,
    out: str | Path,
    *,
    scheme: Scheme = "dynamic",
    kv_scales: KVScales = "none",
    quantize_lm_head: bool = False,
    texts: Sequence[str] = (),
    max_tokens: int = 65536,
    device: str = "auto",
    revision: str | None = None,
    tokenizer: str | Path | None = None,
    lora: str | Path | None = None,
) -> str:
    """Quantise ``model`` (a directory, a Hub repository id, or a bundled model) into the directory ``out``; returns a
    line about it.

    scheme: weights per output channel with inputs per token ("dynamic") or with static scales ("static"), or by 128 x
    128 ("block").
    kv_scales: of keys and values, one per layer ("tensor") or one per head. texts: for static scales, of at most
    ``max_tokens`` tokens together, run on ``device``. tokenizer: its path, if it is not in the checkpoint. lora: a PEFT
    adapter to merge first. ``out`` appears when it is complete. Raises ``ValueError`` for what cannot be done, before
    anything is read.
    """
    source, out = (
        open_checkpoint(model, revision=revision, lora=lora),
        Path(out).resolve(),
    )  # "." is another directory afterwards
    check_wanted(source, out, scheme, kv_scales, has_texts=bool(texts))
    if max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {max_tokens}")
    inventory = take_inventory(source, source.model_config)
    if inventory.kv_scales and kv_scales == "none":
        name, _ = inventory.kv_scales[0]
        raise ValueError(
            f"kv_scales 'none' would lose the scales of keys and values that {source.path} has ({name}): calibrate new "
            "ones with 'tensor' or "
            "'head'"
        )
    calibration = _calibrate(source, texts, max_tokens, device, tokenizer) if texts else None
    with progress_bar("quantise", source.num_bytes, None) as advance:
        export_fp8(
            source,
            out,
            scheme=scheme,
            calibration=calibration,
            kv_scales=kv_scales,
            quantize_lm_head=quantize_lm_head,
            advance=advance,
        )
    written = open_checkpoint(out)
    tokens = "" if calibration is None else f", calibrated on {calibration.num_tokens} tokens"
    return f"{written.describe()}{tokens}; {source.num_bytes / 2**20:.1f} MiB -> {written.num_bytes / 2**20:.1f} MiB"


def _calibrate(
    checkpoint: Checkpoint, texts: Sequence[str], max_tokens: int, device_name: str, tokenizer_path: str | Path | None
) -> Calibration:
    place = checkpoint.tokenizer_path if tokenizer_path is None else Path(tokenizer_path)
    tokenizer = load_tokenizer(place)
    if tokenizer is None:
        raise ValueError(f"{place} has no tokenizer, which calibration needs: give tokenizer")
    config, device = checkpoint.model_config, resolve_device(device_name)
    pieces: list[list[int]] = []
    left = max_tokens
    begin = [] if config.bos_token_id is None else [config.bos_token_id]
    size = max(1, min(_CHUNK, config.max_position_embeddings) - len(begin))
    for text in texts:
        ids = tokenizer.encode(text, bos=False)[:left]
        left -= len(ids)
        pieces += [[*begin, *ids[start : start + size]] for start in range(0, len(ids), size)]
    largest = max((max(ids) for ids in pieces), default=0)
    if not pieces:
        raise ValueError("texts must have at least 1 token to calibrate on, got 0")
    if largest >= config.vocab_size:
        raise ValueError(
            f"the tokenizer of {place} makes token {largest}, and the model's vocab_size is {config.vocab_size}: give "
            "its own tokenizer"
        )
    dtype = resolve_dtype("auto", config.dtype, device)
    weights = load_weights(checkpoint, config, dtype=dtype, device=device)
    ops = Ops.select(Site.of(config, PAGE_SIZE, dtype, device), {})
    with progress_bar("calibrate", sum(map(len, pieces)), None, unit="tokens") as advance:
        return calibrate(config, weights, ops, pieces, advance)
