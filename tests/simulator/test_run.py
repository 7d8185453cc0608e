"""Whole simulations: cases worked out by hand, queueing theory, conservation, routing, conversations, and the planner's
word for it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable
from typing import Any

import pytest

from nemo_engine.config import EngineConfig
from nemo_engine.planner.efficiency import Efficiencies
from nemo_engine.planner.gpus import find_gpu
from nemo_engine.planner.models import BUILT_IN, PlannedModel
from nemo_engine.planner.plan import Load, make_plan
from nemo_engine.planner.roofline import Roofline
from nemo_engine.simulator import EngineShape, Results, Setting, simulate
from nemo_engine.simulator import feed as feed_module
from nemo_engine.workload import Arrivals, Item, Limits, Turn, WorkloadSpec, generate
from tests.simulator.costs import SimpleCost

SHAPE = EngineShape(
    num_pages=4000, page_size=16, max_num_seqs=16, max_num_batched_tokens=64, max_model_len=4096,
    enable_prefix_caching=True, pipeline_depth=1,
)  # fmt: skip


def run(
    items: Iterable[Item],
    arrivals: Arrivals | None = None,
    cost: Any = None,
    shape: dict[str, Any] | None = None,
    **options: Any,
) -> Results:
    setting = Setting(dataclasses.replace(SHAPE, **(shape or {})), cost or SimpleCost(), **options)
    return simulate(items, arrivals or Arrivals("file"), setting)


def spec(text: str) -> Iterable[Item]:
    return generate(WorkloadSpec.parse_text(text, "x"))


def numbers(found: Results) -> dict[str, Any]:
    return {name: value for name, value in found.as_json().items() if "wall" not in name}


@pytest.mark.parametrize("depth", [1, 2])
def test_one_request_by_hand(depth: int) -> None:
    cost = SimpleCost(host=1 / 1024)
    found = run([Item("a", (Turn(100, 4, 100),), 3.0)], cost=cost, shape={"pipeline_depth": depth})
    chunks = [cost.step_seconds(0, 0, [(0, 64)]), cost.step_seconds(0, 0, [(64, 36)])]
    decodes = [cost.step_seconds(1, context, ()) for context in (101, 102, 103)]
    # With two steps in flight, the host plans while the device computes.
    hosts = [1 / 1024] if depth == 2 else [1 / 1024] * 2
    assert found.ttft.total == sum(chunks) + sum(hosts)
    assert found.itl.count == 3 and found.itl.total == sum(decodes) + (3 / 1024 if depth == 1 else 0)
    assert found.e2e.total == found.ttft.total + found.itl.total and found.duration_s == found.e2e.total
    assert found.tpot.total == pytest.approx(found.itl.total / 3)
    # Over the time from the arrival on, in which it runs from first to last.
    assert found.mean_running == pytest.approx(1.0, abs=0.01)
    assert found.mean_decode_rows == pytest.approx(sum(decodes) / found.duration_s, abs=0.02)
    assert (found.num_steps, found.num_finished, found.queue.total) == (5, 1, 0.0 if depth == 2 else 0.0)


def test_md1_queue() -> None:
    """One server with a constant service time D: the mean wait is rho D / (2 (1 - rho))."""
    service = SimpleCost().step_seconds(0, 0, [(0, 32)])
    for rho in (0.3, 0.7):
        found = run(
            spec("requests=8000,input=32,output=1"), Arrivals("poisson", rho / service), shape={"max_num_seqs": 1}
        )
        assert found.queue.mean == pytest.approx(rho * service / (2 * (1 - rho)), rel=0.08)
        assert found.ttft.mean == pytest.approx(found.queue.mean + service) and found.busy_fraction == pytest.approx(
            rho, rel=0.02
        )


def test_saturated_throughput_is_that_of_full_batches() -> None:
    found = run(spec("requests=800,input=16,output=64"), Arrivals("closed", concurrency=16))
    cost = SimpleCost()
    step = cost.step_seconds(16, 16 * 48, ())
    with_prompts = 64 * step + 16 * 16 * cost.token  # of one generation of 16 requests
    assert found.output_tokens_per_s == pytest.approx(16 * 64 / with_prompts, rel=0.05)
    assert 15 < found.mean_running <= 16 and found.busy_fraction == pytest.approx(1.0)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("num_pages", [40, 4000])
def test_tokens_and_pages_are_conserved(seed: int, num_pages: int) -> None:
    text = f"requests=150,input=uniform:1:200,output=uniform:1:120,turns=uniform:1:3,prefixes=2,prefix_tokens=40,seed={seed}"
    items = [item for item in spec(text) if sum(t.num_tokens + t.output_tokens for t in item.turns) + 40 < 600]  # type: ignore[operator]
    found = run(
        items, Arrivals("poisson", 8.0), shape={"num_pages": num_pages}, replicas=1 + seed % 3, routing="least-loaded"
    )
    turns = [turn for item in items for turn in item.turns]
    assert found.num_finished == len(turns) and found.num_refused == 0 and found.num_items == len(items)
    total = sum(turn.output_tokens for turn in turns)
    assert found.output_tokens_per_s * found.duration_s == pytest.approx(total)
    prompts = 0
    for item in items:
        length = 40
        for turn in item.turns:
            length += turn.num_tokens or 0
            prompts += length
            length += turn.output_tokens
    assert found.prompt_tokens_per_s * found.duration_s == pytest.approx(prompts)
    assert found.itl.count == total - len(turns)
    assert (found.num_preemptions > 0) == (num_pages == 40) and found.recomputed_tokens >= 0
    assert found.num_preemptions > 0 or found.recomputed_tokens == 0
    assert (
        found.prefix_hit_rate > (0.05 if num_pages == 40 else 0.3) and 0 < found.mean_kv_used <= found.peak_kv_used <= 1
    )


def test_runs_repeat_and_need_no_particular_stepping(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "requests=300,input=uniform:1:200,output=uniform:1:120,prefixes=3,prefix_tokens=60"
    options: dict[str, Any] = {
        "replicas": 3,
        "routing": "prefix-aware",
        "shape": {"pipeline_depth": 2, "num_pages": 300},
    }
    first = run(spec(text), Arrivals("gamma", 20.0, 0.5), **options)
    assert numbers(first) == numbers(run(spec(text), Arrivals("gamma", 20.0, 0.5), **options))
    assert numbers(first) != numbers(run(spec(text), Arrivals("gamma", 20.0, 0.5, seed=1), **options))
    # Replicas kept in step with one another, as conversations need it, see the same.
    plain = feed_module.Feed.__init__

    def cautious(self: Any, *args: Any) -> None:
        plain(self, *args)
        self.has_feedback = True

    monkeypatch.setattr(feed_module.Feed, "__init__", cautious)
    again = numbers(run(spec(text), Arrivals("gamma", 20.0, 0.5), **options))
    expected = numbers(first)
    for name in (
        "series",
        "mean_kv_used",
        "mean_running",
        "mean_decode_rows",
        "busy_fraction",
    ):  # sums in another order
        del expected[name], again[name]
    for name, value in expected.items():
        assert again[name] == pytest.approx(value), name


def test_a_conversation_finds_its_history_in_the_cache() -> None:
    item = Item("a", (Turn(100, 30, 100), Turn(10, 5, 10, 2.0), Turn(7, 5, 7)), 0.0)
    found = run([item])
    # The second prompt is 140 tokens, of which 129 are computed; the third is 152, of which 144 are.
    assert found.prefix_hit_rate == pytest.approx((129 // 16 * 16 + 144 // 16 * 16) / (100 + 140 + 152))
    assert found.num_finished == 3 and found.duration_s > 2.0
    assert run([item], shape={"enable_prefix_caching": False}).prefix_hit_rate == 0


def test_a_closed_loop_keeps_its_concurrency() -> None:
    for replicas in (1, 2):
        found = run(
            spec("requests=300,input=16,output=uniform:1:60"),
            Arrivals("closed", concurrency=6),
            replicas=replicas,
            routing="least-loaded",
        )
        assert found.num_finished == 300 and found.mean_running * replicas <= 6.0
        assert found.mean_running * replicas > 5.0 and 0.9 < found.busy_fraction <= 1.0


def test_routing() -> None:
    text = "requests=1500,input=16,output=lognormal:40:1.2:1:1500"
    found = {
        routing: run(spec(text), Arrivals("poisson", 3.0), replicas=4, routing=routing, shape={"max_num_seqs": 4})
        for routing in ("round-robin", "least-loaded")
    }
    assert found["least-loaded"].ttft.quantile(0.99) < 0.8 * found["round-robin"].ttft.quantile(0.99)
    text = "requests=700,input=16,output=8,prefixes=24,prefix_tokens=480"
    hits = {
        routing: run(
            spec(text), Arrivals("poisson", 4.0), replicas=4, routing=routing, shape={"num_pages": 300}
        ).prefix_hit_rate
        for routing in ("round-robin", "least-loaded", "prefix-aware")
    }
    assert hits["prefix-aware"] > 0.85 > 0.6 > max(hits["round-robin"], hits["least-loaded"])
    # One prefix for all, and twice what one replica can do: the others help.
    text = "requests=400,input=16,output=40,prefixes=1,prefix_tokens=480"
    aware, least = (
        run(spec(text), Arrivals("poisson", 4.0), replicas=4, routing=routing)
        for routing in ("prefix-aware", "least-loaded")
    )
    assert aware.e2e.mean < 1.5 * least.e2e.mean and aware.prefix_hit_rate > 0.9
    with pytest.raises(ValueError, match="routing must be one of round-robin, .* got 'random'"):
        run(spec("requests=1"), Arrivals("closed", concurrency=1), routing="random")
    with pytest.raises(ValueError, match="replicas must be at least 1, got 0"):
        run(spec("requests=1"), Arrivals("closed", concurrency=1), replicas=0)


def test_priorities() -> None:
    """The short requests first: most wait less, and the last one ends when it did."""
    items = [
        Item(f"{index}", (Turn(40, 100 if index % 2 else 1, 40),), 0.0, priority=5 if index % 2 else 0)
        for index in range(200)
    ]
    fair, urgent = run(items, shape={"max_num_seqs": 2}), run(items, shape={"max_num_seqs": 2}, use_priorities=True)
    assert urgent.queue.quantile(0.5) < 0.3 * fair.queue.quantile(0.5)
    assert urgent.duration_s == pytest.approx(fair.duration_s, rel=0.1)
    equal = [dataclasses.replace(item, priority=0) for item in items]
    assert numbers(fair) == numbers(run(equal, shape={"max_num_seqs": 2}))


def test_what_can_never_run_is_refused_and_the_rest_goes_on() -> None:
    items = [Item("long", (Turn(5000, 4, 5000), Turn(5, 5, 5)), 0.0), Item("ok", (Turn(50, 4, 50),), 0.0)]
    found = run(items)
    assert (found.num_finished, found.num_refused) == (1, 1)
    assert (
        found.first_refusal is not None
        and "'long'" in found.first_refusal
        and "max_model_len 4096" in found.first_refusal
    )
    assert run([items[0]], Arrivals("closed", concurrency=1)).num_finished == 0
    closed = run([items[0], items[1], items[0], items[1]], Arrivals("closed", concurrency=1))
    assert (closed.num_finished, closed.num_refused) == (2, 2)


def test_limits_and_goodput() -> None:
    text = "requests=2000,input=16,output=32"
    slow = run(spec(text), Arrivals("poisson", 4.0), limits=Limits(ttft_s=0.4, itl_s=0.07))
    assert 0.05 < slow.good_fraction < 1 and slow.good_requests_per_s == pytest.approx(
        slow.good_fraction * slow.requests_per_s
    )
    assert run(spec(text), Arrivals("poisson", 4.0)).good_fraction == 1
    assert run(spec(text), Arrivals("poisson", 4.0), limits=Limits(ttft_s=1e-6)).good_fraction == 0
    for arguments in ({"ttft_s": 0.0}, {"itl_s": math.inf}):
        with pytest.raises(ValueError, match="must be finite and greater than 0"):
            Limits(**arguments)


def test_items_without_arrivals_or_lengths_are_named() -> None:
    with pytest.raises(ValueError, match="request 'a' has no arrival_s"):
        run([Item("a", (Turn(5, 5, 5),))])
    with pytest.raises(ValueError, match="request 'a': a prompt of text needs prompt_tokens"):
        run([Item("a", (Turn("hello", 5),), 0.0)])
    text = [
        Item("a", (Turn("hello", 5, 40),), 0.0),
        Item("b", (Turn((1,) * 40, 5, 40),), 0.0),
        Item("c", (Turn((1,) * 40, 5, 40),), 9.0),
    ]
    assert run(text).prefix_hit_rate == pytest.approx(32 / 120)
    setting = Setting(SHAPE, SimpleCost())
    encoded = simulate(text[:1], Arrivals("file"), setting, encode=lambda prompt: [7] * (2 * len(prompt)))
    assert encoded.prompt_tokens_per_s * encoded.duration_s == pytest.approx(10)


def test_the_planner_and_the_simulator_agree() -> None:
    model, gpu = PlannedModel("nemo", BUILT_IN["nemo"]), find_gpu("h200")
    config = EngineConfig(quantization="fp8", kv_cache_dtype="fp8")
    for batch, load in itertools.product((1, 8, 64), (Load(1000, 200), Load(200, 600))):
        plan = make_plan(model, gpu, dataclasses.replace(config, max_num_seqs=batch), load)
        point = plan.points[-1]
        shape = EngineShape(plan.num_pages, 64, batch, 8192, 131072, True, 2)
        cost = Roofline.of(model.config, plan.formats, gpu, Efficiencies())
        # Lengths vary a little, so that requests do not stay in step with one another.
        text = f"requests={20 * batch},input={load.input_tokens},output=uniform:{load.output_tokens * 0.8}:{load.output_tokens * 1.2}"
        found = simulate(spec(text), Arrivals("closed", concurrency=batch), Setting(shape, cost))
        assert found.output_tokens_per_s == pytest.approx(point.tokens_per_s, rel=0.06)
        assert found.tpot.mean == pytest.approx(point.itl, rel=0.06)
        assert found.queue.mean < 0.05


def test_a_long_queue_costs_no_token_lists() -> None:
    found = run(spec("requests=1500,input=500,output=2"), Arrivals("constant", 1e6), shape={"max_num_seqs": 4})
    assert found.num_finished == 1500 and found.mean_running < 4.01
    waits = [value for _, value in found.series["waiting"]]
    assert waits[0] > 1200 and waits[-1] < 100 and len(waits) <= 512
