"""``nemo-engine verify``: how far FP8 is from the reference on this machine; exit code 1 past the limits."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_engine.cli.files import check_results, read_text

_LIMITS = (
    ("--max-perplexity", "perplexity", "X", "percent of perplexity that FP8 weights may cost [1]"),
    ("--max-kv-perplexity", "kv_perplexity", "X", "percent that FP8 keys and values may cost more [0.5]"),
    ("--min-top1", "top1", "X", "part of all tokens whose likeliest must be the same [0.97]"),
)


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "verify",
        help="measure what FP8 costs in accuracy",
        description="Compute stored prompts, a text and retrieval in the reference, with FP8 weights, with FP8 keys "
        "and values, and with both, by this machine's kernels; compare logits, likeliest tokens and perplexity. "
        "Exit code 1 past the limits.",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint directory, a Hub repository id, or nemo-tiny")
    parser.add_argument(
        "--against",
        metavar="REFERENCE",
        default="auto",
        help="the same weights in bf16, fp16 or fp32, or another checkpoint: the one that an FP8 checkpoint was made "
        "of "
        "[auto: the checkpoint's dtype]",
    )
    parser.add_argument(
        "--quantization",
        choices=("fp8", "fp8_block"),
        default="fp8",
        help="of a checkpoint that is not FP8 already [fp8]",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--text", metavar="FILE", type=Path, help="for perplexity, in place of the bundled text")
    parser.add_argument("--max-context", metavar="N", type=int, default=2048, help="the longest of retrieval [2048]")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write what was measured")
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw it, as PNG or SVG by the name (needs matplotlib)"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="if it is not in the checkpoint")
    parser.add_argument("--revision", metavar="NAME", help="of a Hub repository")
    for flag, name, metavar, text in _LIMITS:
        parser.add_argument(flag, dest=name, metavar=metavar, type=float, help=text)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if a configuration is beyond the limits."""
    import torch

    from nemo_engine import __version__
    from nemo_engine.verify import Limits, as_json, plot, report, verify

    check_results(args.json, args.plot)
    limits = {name: getattr(args, name) for _, name, _, _ in _LIMITS if getattr(args, name) is not None}
    results = verify(
        args.model,
        quantization=args.quantization,
        against=args.against,
        device=args.device,
        text=None if args.text is None else read_text("--text", args.text),
        max_context=args.max_context,
        limits=Limits(**limits),
        revision=args.revision,
        tokenizer=args.tokenizer,
    )
    print(report(results))
    if args.json is not None:
        has_gpu = torch.cuda.is_available() and args.device != "cpu"
        facts = {
            "model": args.model,
            "against": args.against,
            "quantization": args.quantization,
            "nemo_engine": __version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if has_gpu else "cpu",
        }
        args.json.write_text(as_json(results, facts))
    if args.plot is not None:
        plot(results, args.plot)
    return int(any(result.faults for result in results))
