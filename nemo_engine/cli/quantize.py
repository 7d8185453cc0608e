"""``nemo-engine quantize``: an FP8 checkpoint from an unquantised one."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_engine.cli.files import read_text


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "quantize",
        help="write an FP8 checkpoint",
        description="Quantise a checkpoint's linear layers to FP8 (e4m3) and write it in the compressed-tensors "
        "format, which "
        "transformers and vLLM read too. OUT appears when it is complete.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="IN", help="a checkpoint directory, a Hub repository id, or nemo-tiny")
    parser.add_argument("out", metavar="OUT", type=Path, help="a directory that does not exist or is empty")
    parser.add_argument(
        "--scheme",
        choices=("dynamic", "static", "block"),
        default="dynamic",
        help="weights per output channel with inputs per token (dynamic) or with scales from calibration (static), or "
        "by 128 x 128 "
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
    parser.add_argument("--tokenizer", metavar="PATH", help="of calibration, if it is not in the checkpoint")
    parser.add_argument("--revision", metavar="NAME", help="of a Hub repository")
    parser.add_argument(
        "--lora",
        metavar="PATH",
        help="a PEFT adapter, a directory or a Hub repository, to merge before anything is quantised",
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from nemo_engine.quantize import quantize_checkpoint

    print(
        quantize_checkpoint(
            args.model,
            args.out,
            scheme=args.scheme,
            kv_scales=args.kv_scales,
            quantize_lm_head=args.quantize_lm_head,
            texts=[read_text("--calibrate", file) for file in args.calibrate or ()],
            max_tokens=args.calibration_tokens,
            device=args.device,
            revision=args.revision,
            tokenizer=args.tokenizer,
            lora=args.lora,
        )
    )
    return 0
