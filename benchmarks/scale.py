"""Up to a thousand H200s on paper: throughput and tail latency of four ways of routing, under conversations and under
questions about documents; replicas that are lost; autoscaling in a morning's rise.

Mistral NeMo in FP8 by its roofline, with the efficiencies that are assumed where nothing has been measured. A run is a
function of its options; what the router's choices cost is measured on this machine.

    python benchmarks/scale.py --json benchmarks/results/NAME.jsonl         # all; minutes each at 1,000 replicas
    python benchmarks/scale.py --study routing --replicas 10 100            # a part of it
"""

from __future__ import annotations

import argparse
import gc
import itertools
import random
import resource
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from nemo_engine.benchmarks.provenance import append_record, provenance
from nemo_engine.config import EngineConfig
from nemo_engine.memory_plan import plan_kv_cache
from nemo_engine.planner.efficiency import Efficiencies
from nemo_engine.planner.gpus import find_gpu
from nemo_engine.planner.models import BUILT_IN, PlannedModel, formats_of
from nemo_engine.planner.roofline import Roofline
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.scaling import replicas_wanted
from nemo_engine.scheduler import Request
from nemo_engine.scheduler.kv_manager import KVManager
from nemo_engine.simulator import ROUTINGS, Changes, EngineShape, Load, Results, Setting, simulate
from nemo_engine.simulator.routing import Router
from nemo_engine.workload import Arrivals, Distribution, Item, Limits, Turn

STUDIES = ("router", "routing", "losses", "autoscaling")
CHAT_RATE, DOCUMENT_RATE = 0.8, 2.2  # conversations, questions a second and replica
DOCUMENTS, DOCUMENT_TOKENS = 4, 16_000  # documents a replica: all of them fit into its cache
RISE_S, PEAK_RATE, PEAK_REPLICAS = 600, 5.5, 4  # of the morning: seconds; requests a second and replica at its end
GOOD = Limits(ttft_s=1.0, itl_s=0.025)  # what a good request keeps to
_NUMBERS = (
    "num_finished", "requests_per_s", "output_tokens_per_s", "good_fraction", "prefix_hit_rate", "busy_fraction",
    "most_busy", "peak_kv_used", "num_preemptions", "duration_s", "arrival_span_s", "replica_s", "num_lost_replicas",
    "num_lost_requests", "num_steps",
)  # fmt: skip


def setting(replicas: int, routing: str, max_num_seqs: int = 256, changes: Changes | None = None) -> Setting:
    """H200s with the engine's defaults in FP8."""
    config = EngineConfig(quantization="fp8", kv_cache_dtype="fp8", max_num_seqs=max_num_seqs)
    model, gpu = PlannedModel("nemo", BUILT_IN["nemo"]), find_gpu("h200")
    formats = formats_of(model, config)
    num_pages, max_model_len, _ = plan_kv_cache(model.config, config, formats.sizes, gpu.free_bytes)
    shape = EngineShape(
        num_pages, config.page_size, config.max_num_seqs, config.tokens_per_step, max_model_len, True, 2
    )
    cost = Roofline.of(model.config, formats, gpu, Efficiencies())
    return Setting(shape, cost, replicas, routing, limits=GOOD, changes=changes or Changes())


def conversations(replicas: int, seconds: float, rate: float) -> Iterator[Item]:
    """A long first turn (a file, a page), then short ones; ``rate``: of conversations that begin, a replica."""
    rng = random.Random("conversations")
    first, later = Distribution.parse("lognormal:10000:0.6:500:60000", ""), Distribution.parse("lognormal:200:0.7", "")
    output, think = Distribution.parse("lognormal:250:0.6:10:2000", ""), Distribution.parse("exponential:4", "")
    now = 0.0
    for index in itertools.count():
        now += rng.expovariate(rate * replicas)
        if now > seconds:
            return
        turns = []
        for place in range(rng.randint(2, 6)):
            count = (later if place else first).draw_count(rng)
            turns.append(Turn(count, output.draw_count(rng), count, think.draw(rng) if place else 0.0))
        yield Item(f"{index}", tuple(turns), now)


def documents(replicas: int, seconds: float, rate: float) -> Iterator[Item]:
    """Questions of many users about long documents, of which the k-th is asked about k**-0.8 as often."""
    rng = random.Random("documents")
    count = DOCUMENTS * replicas
    weights = list(itertools.accumulate((place + 1) ** -0.8 for place in range(count)))
    names = range(count)
    output = Distribution.parse("lognormal:150:0.6:10:1000", "")
    now = 0.0
    for index in itertools.count():
        now += rng.expovariate(rate * replicas)
        if now > seconds:
            return
        (name,) = rng.choices(names, cum_weights=weights)
        yield Item(f"{index}", (Turn(100, output.draw_count(rng), 100),), now, f"{name}", DOCUMENT_TOKENS)


def morning(replicas: int) -> Iterator[Item]:
    """Short prompts and long answers, which grow from a twentieth of what ``replicas`` bear to all of it, and stay."""
    rng = random.Random("morning")
    output = Distribution.parse("lognormal:900:0.5:10:4000", "")
    now = 0.0
    for index in itertools.count():
        now += rng.expovariate(PEAK_RATE * replicas)
        if now > 1.25 * RISE_S:
            return
        if rng.random() < 0.05 + 0.95 * min(1.0, now / RISE_S):
            yield Item(f"{index}", (Turn(200, output.draw_count(rng), 200),), now)


def one_more(load: Load) -> int:
    """A replica more while requests wait, whatever their number."""
    return load.replicas + 1 if load.waiting else replicas_wanted(*_numbers(load))


def as_needed(load: Load) -> int:
    """What ``nemo_engine.ray`` does."""
    return replicas_wanted(*_numbers(load))


POLICIES = {"none": None, "one more": one_more, "as needed": as_needed}


def _numbers(load: Load) -> tuple[int, float, float, float, float]:
    return load.replicas, load.running, load.waiting, load.kv_use, load.slots


def cases(args: argparse.Namespace) -> Iterator[tuple[dict[str, Any], Setting, Iterator[Item]]]:
    """What is run: its facts, the fleet, and the requests."""
    if "routing" in args.study:
        for replicas, name, routing in itertools.product(args.replicas, args.workload, args.routing):
            make, rate = (conversations, CHAT_RATE) if name == "conversations" else (documents, DOCUMENT_RATE)
            facts = {"study": "routing", "workload": name, "routing": routing, "replicas": replicas, "rate": rate}
            yield facts | {"seconds": args.seconds}, setting(replicas, routing), make(replicas, args.seconds, rate)
    if "losses" in args.study:
        for routing, part in itertools.product(("session-affinity",), (0.0, 6.0)):
            facts = {"study": "losses", "routing": routing, "replicas": 20, "losses_per_hour": part, "seconds": 150}
            changes = Changes(losses_per_hour=part, boot_s=90)
            yield facts, setting(20, routing, changes=changes), conversations(20, 150, CHAT_RATE)
    if "autoscaling" in args.study:
        for name, wanted in ((name, POLICIES[name]) for name in args.policy):
            changes = Changes(wanted=wanted, boot_s=90, upscale_s=30, period_s=10)
            facts = {
                "study": "autoscaling",
                "policy": name,
                "replicas": PEAK_REPLICAS if wanted is None else 1,
                "boot_s": 90,
            }
            yield facts, setting(facts["replicas"], "least-loaded", 32, changes), morning(PEAK_REPLICAS)  # type: ignore[arg-type]


def router_costs(replicas: int) -> Iterator[dict[str, Any]]:
    """Microseconds of this machine's processor for a choice among ``replicas`` that have been sent their documents, and
    for the hashes of the pages of a question, which the engine computes as well.
    """
    pages = DOCUMENT_TOKENS // 64
    rng = random.Random("router")
    for routing in ROUTINGS:
        router = Router(routing, 24_000)
        for replica in range(replicas):
            router.add(replica)
        for document in range(DOCUMENTS * replicas):
            router.choose(f"{document}", [(document, page) for page in range(pages)] if router.needs_pages else ())
        wanted = [rng.randrange(DOCUMENTS * replicas) for _ in range(2000)]
        prompts = [[(name, page) for page in range(pages)] if router.needs_pages else [] for name in wanted]
        started = time.process_time()
        for name, prompt in zip(wanted, prompts):
            router.ended(router.choose(f"{name}", prompt))
        yield {"routing": routing, "replicas": replicas, "us": (time.process_time() - started) / len(wanted) * 1e6}
    kv = KVManager(8, 64, True)
    params = SamplingParams(max_tokens=1)
    requests = [Request(f"{place}", [place + 7] * DOCUMENT_TOKENS, params) for place in range(100)]
    started = time.process_time()
    for request in requests:
        kv.extend_hashes(request, pages)
    yield {"routing": "hashes", "replicas": replicas, "us": (time.process_time() - started) / len(requests) * 1e6}


def main(argv: Sequence[str] | None = None) -> None:
    """Run, print a line a case; ``--json`` appends them to a file, ``--plot`` draws what that file has."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--study", nargs="*", choices=STUDIES, default=STUDIES)
    parser.add_argument("--replicas", type=int, nargs="*", default=[10, 100, 1000], help="of the study of routing")
    parser.add_argument("--workload", nargs="*", choices=("conversations", "documents"),
                        default=("conversations", "documents"))  # fmt: skip
    parser.add_argument("--routing", nargs="*", choices=ROUTINGS, default=ROUTINGS)
    parser.add_argument("--seconds", type=float, default=8.0, help="of arrivals in the study of routing")
    parser.add_argument("--policy", nargs="*", choices=tuple(POLICIES), default=tuple(POLICIES), help="of autoscaling")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    facts = provenance()
    for replicas in args.replicas if "router" in args.study else ():
        for cost in router_costs(replicas):
            print(cost, flush=True)
            append_record(args.json, {"benchmark": "scale", "study": "router", **cost, **facts})
    for case, fleet, items in cases(args):
        gc.disable()  # a thousand caches of pages are looked through in vain
        started = time.process_time()
        found = simulate(items, Arrivals("file"), fleet)
        record = {"benchmark": "scale", **case, **numbers(found), "cpu_s": time.process_time() - started}
        if case["study"] == "autoscaling":
            record["up"] = found.series["replicas"][-200:]
        record["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        print({name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()
               if name != "up"}, flush=True)  # fmt: skip
        append_record(args.json, record | facts)
        del found, fleet
        gc.enable()
        gc.collect()


def numbers(found: Results) -> dict[str, Any]:
    """Of a run."""
    data: dict[str, Any] = {}
    for name in ("ttft", "tpot", "e2e", "queue"):
        sketch = getattr(found, name)
        data[name] = {f"p{q}": sketch.quantile(q / 100) for q in (50, 90, 99)} | {"max": sketch.largest}
    for name in _NUMBERS:
        data[name] = getattr(found, name)
    return data


if __name__ == "__main__":
    main()
