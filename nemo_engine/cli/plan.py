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
    acceptance_of,
    add_model_arguments,
    config_of,
    gpus_of,
    model_of,
    results_folder,
)
from nemo_engine.cli.values import add_list, seconds


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "plan",
        help="show what a model needs on a GPU, what fits, and what speed to expect",
        description="Plan a model on a GPU without having one: memory item by item as the engine itself plans it at "
        "start-up, the largest "
        "context and batch, times from the roofline and from efficiencies that were measured or are assumed, and what "
        "load meets given limits. "
        "Several GPUs make a table. Exit code 1 if it does not fit, on none of them.",
        allow_abbrev=False,
    )
    add_model_arguments(parser, (*OPTIONS, "enforce_eager"), several=True)
    group = parser.add_argument_group("load")
    group.add_argument("--tp", metavar="N", type=int, default=1, help="GPUs that share the model, on paper [1]")
    group.add_argument("--context", metavar="N", type=int, help="the same as --max-model-len")
    group.add_argument("--input", metavar="N", type=int, default=1000, help="tokens of a prompt [1000]")
    group.add_argument("--output", metavar="N", type=int, default=200, help="tokens of an answer [200]")
    group.add_argument("--slo-ttft", metavar="TIME", type=seconds, help="limit of the time to the first token, as 1s")
    group.add_argument(
        "--slo-itl", metavar="TIME", type=seconds, help="limit of the mean time from token to token, as 30ms"
    )
    add_list(
        group, "--price-per-hour", float, "prices", metavar="X",
        help="of one GPU, or one price for each, for the cost of a million tokens",
    )  # fmt: skip
    group.add_argument("--currency", metavar="NAME", default="", help="of the prices, as EUR")
    parser.add_argument("-v", "--verbose", action="store_true", help="with efficiencies and published results")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the plan")
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command; 1 if the plan does not fit."""
    from nemo_engine.planner.efficiency import Efficiencies
    from nemo_engine.planner.gpus import Gpu
    from nemo_engine.planner.plan import Load, Plan, make_plan
    from nemo_engine.planner.report import accuracy, as_json, compare, report
    from nemo_engine.workload import Limits

    check_writable("--json", args.json)
    if args.context is not None:
        if getattr(args, "engine_option_max_model_len", None) is not None:
            raise ValueError(f"--context and --max-model-len are the same: give one, got {args.context} and another")
        args.engine_option_max_model_len = args.context
    gpus, config, model = gpus_of(args), config_of(args), model_of(args)
    acceptance = acceptance_of(args, config)
    prices = args.price_per_hour or [None]
    if len(prices) not in (1, len(gpus)):
        raise ValueError(f"--price-per-hour takes one price, or one for each GPU, got {len(prices)} for {len(gpus)}")
    if args.currency and args.price_per_hour is None:
        raise ValueError(f"--currency is that of --price-per-hour, which is not given, got {args.currency!r}")
    plans: list[tuple[Gpu, Plan | str]] = []
    for gpu, price in zip(gpus, prices * len(gpus) if len(prices) == 1 else prices):
        load = Load(args.input, args.output, Limits(args.slo_ttft, args.slo_itl), price, args.currency)
        efficiencies = Efficiencies.read(gpu, results_folder(args))
        try:
            plans.append((gpu, make_plan(model, gpu, config, load, efficiencies, args.tp, acceptance)))
        except ValueError as error:
            if len(gpus) == 1:
                raise
            plans.append((gpu, str(error)))
    fitting = [plan for _, plan in plans if isinstance(plan, Plan)]
    if not fitting:
        raise ValueError("; ".join(dict.fromkeys(str(reason) for _, reason in plans)))
    if len(plans) == 1:
        print(report(fitting[0], verbose=args.verbose))
    else:
        print(compare(plans))
        print("\n".join(line for plan in fitting[:1] for line in accuracy("", plan.efficiencies)))
    if args.json is not None:
        data = [as_json(plan) if isinstance(plan, Plan) else {"gpu": gpu.name, "error": plan} for gpu, plan in plans]
        text = json.dumps(data[0] if len(data) == 1 else data, indent=2)
        args.json.write_text(text + "\n", encoding="utf-8")
    return int(all(plan.shortage is not None for plan in fitting))
