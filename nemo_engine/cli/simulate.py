"""``nemo-engine simulate``: the real scheduler on a virtual clock, over a workload, at one or several rates."""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_engine.checkpoint.checkpoint import BUNDLED
from nemo_engine.cli.files import check_results
from nemo_engine.cli.planning import (
    OPTIONS,
    acceptance_of,
    add_model_arguments,
    config_of,
    gpu_of,
    model_of,
    results_folder,
)
from nemo_engine.cli.values import above_zero, add_list, seconds

if TYPE_CHECKING:
    from nemo_engine.config import EngineConfig
    from nemo_engine.planner.efficiency import Efficiencies
    from nemo_engine.planner.models import PlannedModel
    from nemo_engine.simulator import Results, Setting
    from nemo_engine.workload import Arrivals, Item

_PATIENCE_S = 2.0  # a bar appears after so many seconds


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> argparse.ArgumentParser:
    """Describe the command."""
    parser = commands.add_parser(
        "simulate",
        help="simulate serving a workload: latencies, goodput, KV cache, preemptions, prefix hits",
        description="Run the engine's scheduler and KV manager over a workload on a virtual clock, with a step's time "
        "from a GPU's roofline or "
        "from a fitted cost model. Needs neither GPU nor torch.",
        allow_abbrev=False,
    )
    add_model_arguments(parser, (*OPTIONS, "enable_prefix_caching", "scheduling_policy"), several=False)
    parser.add_argument(
        "--cost-model",
        metavar="FILE",
        type=Path,
        help="times of steps as fitted from measurements, in place of the GPU's roofline",
    )
    group = parser.add_argument_group("workload")
    group.add_argument(
        "--workload",
        metavar="FILE",
        type=Path,
        help="JSON lines, a request each; or ShareGPT's JSON, its lengths a fourth of its characters without a "
        "tokenizer",
    )
    group.add_argument(
        "--synthetic",
        metavar="SPEC",
        help="in place of a file: "
        "requests=1000,input=lognormal:800:0.8,output=uniform:50:400,prefixes=4,prefix_tokens=512,turns=3,"
        "think_s=exponential:5,seed=0; lognormal:800:0.8 has the median 800 and the sigma 0.8",
    )
    group.add_argument("--requests", metavar="N", type=int, help="take the first N of the workload only")
    add_list(
        group, "--rate", above_zero(float), "numbers above 0", metavar="X",
        help="requests per second; several are a sweep",
    )  # fmt: skip
    group.add_argument(
        "--arrivals",
        choices=("poisson", "gamma", "constant", "file"),
        help="[poisson with a rate, else the file's own]",
    )
    group.add_argument(
        "--burstiness", metavar="X", type=float, default=1.0, help="of gamma arrivals: below 1 in bursts [1]"
    )
    add_list(
        group, "--concurrency", above_zero(int), "whole numbers above 0", metavar="N",
        help="a closed loop of so many in place of a rate; several are a sweep",
    )  # fmt: skip
    group.add_argument("--arrival-seed", metavar="N", type=int, default=0, help="of the arrivals' noise [0]")
    group = parser.add_argument_group("deployment")
    group.add_argument("--replicas", metavar="N", type=int, default=1, help="engines behind a router [1]")
    routings = ("round-robin", "least-loaded", "prefix-aware", "session-affinity")
    group.add_argument("--routing", choices=routings, default="round-robin", help="which engine takes a request")
    group.add_argument("--slo-ttft", metavar="TIME", type=seconds, help="a good request's time to first token, as 1s")
    group.add_argument(
        "--slo-itl", metavar="TIME", type=seconds, help="a good request's mean time from token to token, as 30ms"
    )
    parser.add_argument("--json", metavar="FILE", type=Path, help="write all numbers")
    parser.add_argument(
        "--plot", metavar="FILE", type=Path, help="draw them, as PNG or SVG by the name (needs matplotlib)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    from nemo_engine.planner.report import accuracy
    from nemo_engine.simulator import simulate
    from nemo_engine.simulator.report import plot, report, verdict

    check_results(args.json, args.plot)
    if (args.workload is None) == (args.synthetic is None):
        raise ValueError("give a --workload file or a --synthetic specification, and not both")
    if args.requests is not None and args.requests < 1:
        raise ValueError(f"--requests must be at least 1, got {args.requests}")
    if args.workload is not None and not args.workload.is_file():
        raise ValueError(f"--workload must be a file, got {str(args.workload)!r}")
    config, model = config_of(args), model_of(args)
    facts, setting, efficiencies = setting_of(args, config, model)
    label, points = sweep(args)
    encode = _encoder(args)
    runs: list[tuple[float, Results]] = []
    for value, arrivals in points:
        bar = _Bar(f"{label} {value:g}")
        try:
            runs.append((value, simulate(_items(args, encode), arrivals, setting, encode=encode, progress=bar.update)))
        finally:
            bar.close()
    print(verdict(label, runs, setting.limits))
    print(
        f"{facts['model']} on {setting.replicas} x {facts['machine']}, {setting.shape.num_pages:,} KV pages of "
        f"{setting.shape.page_size}"
    )
    print(report(label, [(f"{value:g}", results) for value, results in runs]))
    if efficiencies is not None:
        print("\n".join(accuracy(args.gpu, efficiencies)))
    if args.json is not None:
        records = [{label: value, **results.as_json()} for value, results in runs]
        args.json.write_text(json.dumps(facts | {"runs": records}, indent=1) + "\n", encoding="utf-8")
    if args.plot is not None:
        plot(label, runs, setting.limits, args.plot)
    return 0


def setting_of(
    args: argparse.Namespace, config: EngineConfig, model: PlannedModel
) -> tuple[dict[str, Any], Setting, Efficiencies | None]:
    """(description of the simulated engine, the engine with the pages that it would have, the efficiencies behind its
    times if these are not fitted).
    """
    from nemo_engine.memory_plan import plan_kv_cache
    from nemo_engine.planner.efficiency import Efficiencies
    from nemo_engine.planner.models import formats_of
    from nemo_engine.planner.roofline import Roofline, StepCost
    from nemo_engine.simulator import CostModel, EngineShape, Setting
    from nemo_engine.workload import Limits

    if args.gpu is None and args.cost_model is None:
        raise ValueError("give a --gpu, a --cost-model, or both (the GPU's memory and the model's times)")
    formats = formats_of(model, config)
    gpu = None if args.gpu is None else gpu_of(args)
    num_pages, max_model_len, _ = plan_kv_cache(
        model.config, config, formats.sizes, None if gpu is None else gpu.free_bytes
    )
    cost: StepCost
    efficiencies = None
    facts: dict[str, Any] = {"model": model.name, "workload": str(args.workload or args.synthetic)}
    if args.cost_model is not None:
        fitted = CostModel.load(args.cost_model)
        cost = fitted
        facts |= {"machine": f"the machine of {args.cost_model}", "cost_model": dict(fitted.facts)}
    else:
        assert gpu is not None
        efficiencies = Efficiencies.read(gpu, results_folder(args))
        cost = Roofline.of(model.config, formats, gpu, efficiencies)
        facts |= {"machine": gpu.title, "efficiencies": asdict(efficiencies)}
    device = "cpu" if gpu is None else "cuda"
    shape = EngineShape(
        num_pages, config.page_size, config.max_num_seqs, config.tokens_per_step, max_model_len,
        config.enable_prefix_caching, config.steps_in_flight(device), config.widths, config.num_speculative_tokens,
        acceptance_of(args, config),
    )  # fmt: skip
    setting = Setting(
        shape,
        cost,
        args.replicas,
        args.routing,
        config.scheduling_policy == "priority",
        Limits(args.slo_ttft, args.slo_itl),
    )
    facts |= {"engine": asdict(shape), "replicas": args.replicas, "routing": args.routing}
    return facts, setting, efficiencies


def sweep(args: argparse.Namespace) -> tuple[str, list[tuple[float, Arrivals]]]:
    """What varies, and the arrivals at each of its values."""
    from nemo_engine.workload import Arrivals

    seed = args.arrival_seed
    if args.concurrency is not None:
        if args.rate is not None or args.arrivals is not None:
            raise ValueError("--concurrency is a closed loop: give no --rate and no --arrivals")
        return "concurrency", [(count, Arrivals("closed", concurrency=count, seed=seed)) for count in args.concurrency]
    kind = args.arrivals or ("file" if args.rate is None else "gamma" if args.burstiness != 1.0 else "poisson")
    if args.burstiness != 1.0 and kind != "gamma":
        raise ValueError(f"--burstiness is for gamma arrivals, got {args.burstiness} with {kind!r}")
    if kind == "file":
        if args.rate is not None:
            raise ValueError(f"--rate is not for the file's own arrivals, got {args.rate[0]:g}")
        return "run", [(1, Arrivals("file"))]
    if args.rate is None:
        raise ValueError(f"--arrivals {kind} needs a --rate")
    return "rate", [(rate, Arrivals(kind, rate, args.burstiness, seed=seed)) for rate in args.rate]


def _items(args: argparse.Namespace, encode: Any) -> Iterator[Item]:
    from nemo_engine.workload import (
        WorkloadSpec,
        estimate_tokens,
        generate,
        is_sharegpt,
        read_sharegpt,
        read_workload,
    )

    if args.workload is None:
        items = generate(WorkloadSpec.parse_text(args.synthetic, "--synthetic"))
    elif is_sharegpt(args.workload):
        count = estimate_tokens if encode is None else lambda text: len(encode(text))
        items = read_sharegpt(args.workload, count, is_multi_turn=True)
    else:
        items = read_workload(args.workload)
    return items if args.requests is None else islice(items, args.requests)


def _encoder(args: argparse.Namespace) -> Any:
    """Makes token ids of texts and messages, if the model comes with a tokenizer; None without."""
    path = BUNDLED.get(args.model, Path(args.model).expanduser())
    if not path.is_dir():
        return None
    renderers = None

    def encode(prompt: Any) -> Sequence[int]:
        nonlocal renderers
        from nemo_engine.text import ChatRenderers, load_tokenizer

        if renderers is None:
            tokenizer = load_tokenizer(path)
            if tokenizer is None:
                raise ValueError(f"{path} has no tokenizer: a prompt of text needs prompt_tokens beside it")
            renderers = ChatRenderers(tokenizer, [path])
        return renderers.tokenizer.encode(prompt) if isinstance(prompt, str) else renderers.default.render(list(prompt))

    return encode if any(path.glob("tekken*")) or any(path.glob("tokenizer*")) else None


class _Bar:
    """Shows the progress of a long run; nothing in the first two seconds, without a terminal, or without tqdm."""

    def __init__(self, text: str) -> None:
        self._bar: Any = None
        if importlib.util.find_spec("tqdm") is not None:
            from tqdm.auto import tqdm

            self._bar = tqdm(desc=text, unit="request", delay=_PATIENCE_S, disable=None)

    def update(self, num_done: int, virtual_s: float) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(f"virtual {virtual_s:,.0f} s", refresh=False)
            self._bar.update(num_done - self._bar.n)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
