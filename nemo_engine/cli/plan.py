"""``nemo-engine plan``: what a model needs on a GPU, what fits, and how fast it can be expected to be.

Needs neither GPU nor torch.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from nemo_engine.cli.files import check_writable
from nemo_engine.cli.planning import (
    OPTIONS,
    add_model_arguments,
    config_of,
    gpu_of,
    model_of,
    results_folder,
)
from nemo_engine.cli.values import seconds


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "plan",
        help="show what a model needs on a GPU, what fits, and what speed to expect",
        description="Plan a model on a GPU without having one: memory item by item as the engine itself plans it at "
        "start-up, the largest "
        "context and batch, times from the roofline and from efficiencies that were measured or are assumed, and what "
        "load meets given limits. "
        "Exit code 1 if it does not fit.",
        allow_abbrev=False,
    )
    add_model_arguments(parser, (*OPTIONS, "enforce_eager"), needs_gpu=True)
    group = parser.add_argument_group("load")
    group.add_argument("--tp", metavar="N", type=int, default=1, help="GPUs that share the model, on paper [1]")
    group.add_argument("--context", metavar="N", type=int, help="the same as --max-model-len")
    group.add_argument("--input", metavar="N", type=int, default=1000, help="tokens of a prompt [1000]")
    group.add_argument("--output", metavar="N", type=int, default=200, help="tokens of an answer [200]")
    group.add_argument("--slo-ttft", metavar="TIME", type=seconds, help="limit of the time to the first token, as 1s")
    group.add_argument(
        "--slo-itl", metavar="TIME", type=seconds, help="limit of the mean time from token to token, as 30ms"
    )
    group.add_argument("--price-per-hour", metavar="X", type=float, help="of one GPU, for the cost of a million tokens")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the plan")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if the plan does not fit."""
    from nemo_engine.planner.efficiency import Efficiencies
    from nemo_engine.planner.plan import Load, make_plan
    from nemo_engine.planner.report import as_json, report
    from nemo_engine.workload import Limits

    check_writable("--json", args.json)
    if args.context is not None:
        if getattr(args, "engine_option_max_model_len", None) is not None:
            raise ValueError(f"--context and --max-model-len are the same: give one, got {args.context} and another")
        args.engine_option_max_model_len = args.context
    config, gpu = config_of(args), gpu_of(args)
    load = Load(args.input, args.output, Limits(args.slo_ttft, args.slo_itl), args.price_per_hour)
    efficiencies = Efficiencies.read(gpu, results_folder(args))
    plan = make_plan(model_of(args), gpu, config, load, efficiencies, args.tp)
    print(report(plan))
    if args.json is not None:
        args.json.write_text(json.dumps(as_json(plan), indent=2) + "\n", encoding="utf-8")
    return int(plan.shortage is not None)
