"""``nemo-engine quantize``: an FP8 checkpoint from an unquantised one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nemo_engine.model.calibration import Calibration
    from nemo_engine.model.checkpoint import Checkpoint

_CHUNK = 2048  # tokens of calibration text that are one request


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "quantize",
        help="write an FP8 checkpoint",
        description="Quantise a checkpoint's linear layers to FP8 (e4m3) and write it in the compressed-tensors format, which "
        "transformers and vLLM read too. OUT appears when it is complete.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="IN", help="a checkpoint directory, a Hub repository id, or nemo-tiny")
    parser.add_argument("out", metavar="OUT", type=Path, help="a directory that does not exist or is empty")
    parser.add_argument(
        "--scheme",
        choices=("dynamic", "static", "block"),
        default="dynamic",
        help="weights per output channel with inputs per token (dynamic) or with scales from calibration (static), or by 128 x 128 "
        "(block) [dynamic]",
    )
    parser.add_argument(
        "--kv-scales",
        choices=("none", "tensor", "head"),
        default="none",
        help="calibrated scales of keys and values for an FP8 KV cache: one per layer (tensor), or one per head",
    )
    parser.add_argument("--quantize-lm-head", action="store_true", help="the head too")
    parser.add_argument(
        "--calibrate", metavar="FILE", type=Path, action="append", help="text for static scales; may be repeated"
    )
    parser.add_argument(
        "--calibration-tokens", metavar="N", type=int, default=65536, help="of all that text at most [65536]"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="of calibration [auto]")
    parser.add_argument("--revision", metavar="NAME", help="of a Hub repository")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from nemo_engine.model.checkpoint import open_checkpoint
    from nemo_engine.model.export import export_fp8
    from nemo_engine.model.inventory import take_inventory
    from nemo_engine.model.progress import progress_bar

    needs_text = args.scheme == "static" or args.kv_scales != "none"
    if needs_text and not args.calibrate:
        raise ValueError("--scheme static and --kv-scales need --calibrate FILE")
    if args.calibrate and not needs_text:
        raise ValueError("--calibrate has no use without --scheme static or --kv-scales")
    if args.calibration_tokens < 1:
        raise ValueError(f"--calibration-tokens must be at least 1, got {args.calibration_tokens}")
    checkpoint = open_checkpoint(args.model, revision=args.revision)
    take_inventory(checkpoint, checkpoint.model_config)
    calibration = _calibrate(checkpoint, args) if needs_text else None
    with progress_bar("quantise", checkpoint.num_bytes, None) as advance:
        export_fp8(
            checkpoint,
            args.out,
            scheme=args.scheme,
            calibration=calibration,
            kv_scales=args.kv_scales,
            quantize_lm_head=args.quantize_lm_head,
            advance=advance,
        )
    written = open_checkpoint(args.out)
    text = "" if calibration is None else f", calibrated on {calibration.num_tokens} tokens"
    print(f"{written.describe()}{text}; {checkpoint.num_bytes / 2**20:.1f} MiB -> {written.num_bytes / 2**20:.1f} MiB")
    return 0


def _calibrate(checkpoint: Checkpoint, args: argparse.Namespace) -> Calibration:
    """Scales from the text of ``--calibrate``."""
    from nemo_engine.model.calibration import PAGE_SIZE, calibrate
    from nemo_engine.model.loading import load_weights
    from nemo_engine.model.progress import progress_bar
    from nemo_engine.ops import Ops, Site
    from nemo_engine.runner.precision import resolve_dtype
    from nemo_engine.runner.startup import resolve_device
    from nemo_engine.text import load_tokenizer

    tokenizer = load_tokenizer(checkpoint.path)
    if tokenizer is None:
        raise ValueError(f"{checkpoint.path} has no tokenizer, which calibration needs")
    config, device = checkpoint.model_config, resolve_device(args.device)
    texts: list[list[int]] = []
    left = args.calibration_tokens
    for file in args.calibrate:
        ids = tokenizer.encode(file.read_text(encoding="utf-8"), bos=False)[:left]
        left -= len(ids)
        texts += [[1, *ids[start : start + _CHUNK - 1]] for start in range(0, len(ids), _CHUNK - 1)]
    dtype = resolve_dtype("auto", config.dtype, device)
    weights = load_weights(checkpoint, config, dtype=dtype, device=device)
    ops = Ops.select(Site.of(config, PAGE_SIZE, dtype, device), {})
    with progress_bar("calibrate", sum(map(len, texts)), None) as advance:
        return calibrate(config, weights, ops, texts, advance)
