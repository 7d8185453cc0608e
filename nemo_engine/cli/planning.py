"""The arguments that ``plan`` and ``simulate`` share: the model, the GPU and the engine's options."""

from __future__ import annotations

import argparse
from pathlib import Path

from nemo_engine.cli.arguments import add_some_engine_arguments, engine_options
from nemo_engine.cli.values import add_list
from nemo_engine.config import EngineConfig
from nemo_engine.planner.drafts import NO_DRAFTS, Acceptance
from nemo_engine.planner.gpus import GPUS, Gpu, find_gpu
from nemo_engine.planner.models import BUILT_IN, PlannedModel, read_model

OPTIONS = (
    "dtype",
    "quantization",
    "quantize_lm_head",
    "kv_cache_dtype",
    "max_model_len",
    "max_num_seqs",
    "max_num_batched_tokens",
    "page_size",
    "kv_cache_gib",
    "num_kv_pages",
    "pipeline_depth",
    "speculative_config",
)


def add_model_arguments(parser: argparse.ArgumentParser, options: tuple[str, ...], *, several: bool) -> None:
    """Add the model, the GPU (or ``several``, at least one), and the engine's options that matter on paper."""
    names = ", ".join(BUILT_IN)
    parser.add_argument(
        "model", metavar="MODEL", help=f"a checkpoint directory, a Hub repository id, nemo-tiny, or one of {names}"
    )
    if several:
        add_list(parser, "--gpu", known_gpu, "GPUs", metavar="NAME", required=True, help=f"of {', '.join(GPUS)}")
    else:
        parser.add_argument("--gpu", metavar="NAME", type=known_gpu, help=f"one of {', '.join(GPUS)}")
    parser.add_argument("--memory-gib", metavar="X", type=float, help="of the GPU, in place of what it has")
    parser.add_argument("--revision", metavar="NAME", help="of a Hub repository")
    parser.add_argument("--results", metavar="DIR", type=Path, help="measurements (*.jsonl) that replace assumptions")
    add_some_engine_arguments(parser, options, "engine options")
    parser.add_argument(
        "--acceptance", metavar="X[,X,...]",
        help="with --speculative-config: the share of drafts that are right of those behind right ones, as 0.6; or the "
        "shares of rows whose first draft is right, whose first two are, ..., as 0.7,0.6,0.55",
    )  # fmt: skip


def model_of(args: argparse.Namespace) -> PlannedModel:
    """The model that was named, by its configuration and its headers alone."""
    return read_model(args.model, args.revision)


def gpu_of(args: argparse.Namespace) -> Gpu:
    """The GPU that was named."""
    if args.memory_gib is not None and not 0.6 < args.memory_gib < 1e6:
        raise ValueError(f"--memory-gib must be from 0.6 to 1000000, got {args.memory_gib}")
    return find_gpu(args.gpu, args.memory_gib)


def gpus_of(args: argparse.Namespace) -> list[Gpu]:
    """The GPUs that were named, each once."""
    return [gpu_of(argparse.Namespace(gpu=name, memory_gib=args.memory_gib)) for name in dict.fromkeys(args.gpu)]


def known_gpu(text: str) -> str:
    """``text``, if a GPU is called so. Raises ``argparse.ArgumentTypeError``."""
    try:
        return find_gpu(text).name
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def config_of(args: argparse.Namespace) -> EngineConfig:
    """The engine's options."""
    return EngineConfig(**engine_options(args))


def acceptance_of(args: argparse.Namespace, config: EngineConfig) -> Acceptance:
    """``--acceptance``, which drafts need and nothing else takes."""
    count = config.num_speculative_tokens
    if (args.acceptance is None) != (count == 0):
        raise ValueError("--speculative-config and --acceptance (how many drafts are right) go together")
    return NO_DRAFTS if args.acceptance is None else Acceptance.parse(args.acceptance, count)


def results_folder(args: argparse.Namespace) -> Path | None:
    """``--results``, or the results of this checkout."""
    if args.results is not None:
        if not args.results.is_dir():
            raise ValueError(f"--results must be a directory, got {str(args.results)!r}")
        return Path(args.results)
    here = Path(__file__).parents[2] / "benchmarks" / "results"
    return here if here.is_dir() else None
