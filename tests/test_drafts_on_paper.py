"""What planner and simulator say of speculation: by hand, and that the real scheduler in the simulator agrees."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from nemo_engine.cli import main
from nemo_engine.config import EngineConfig
from nemo_engine.planner.drafts import Acceptance
from nemo_engine.planner.gpus import find_gpu
from nemo_engine.planner.models import BUILT_IN, PlannedModel
from nemo_engine.planner.plan import Load, Plan, make_plan
from nemo_engine.planner.roofline import Roofline
from nemo_engine.simulator import EngineShape, Results, Setting, simulate
from nemo_engine.workload import Arrivals, WorkloadSpec, generate
from tests.simulator.costs import SimpleCost

SHAPE = EngineShape(
    num_pages=4000, page_size=16, max_num_seqs=16, max_num_batched_tokens=256, max_model_len=4096,
    enable_prefix_caching=True, pipeline_depth=1,
)  # fmt: skip
NARROW: dict[str, Any] = {"widths": (), "num_drafts": 0}
DRAFTING: dict[str, Any] = {"speculative_config": {"method": "ngram"}}


def test_acceptance_is_a_distribution() -> None:
    half = Acceptance.parse("0.5", 3)
    assert half.at_least == (0.5, 0.25, 0.125) and half.expected(2) == 0.75
    shares = Acceptance.parse("0.7,0.6", 7)
    assert shares.expected(7) == pytest.approx(1.3)
    counts = [shares.num_right((index + 0.5) / 100) for index in range(100)]
    assert (counts.count(0), counts.count(1), counts.count(2)) == (30, 10, 60)
    for text, message in (
        ("0.6,0.7", "must fall"), ("1.5", "must fall"), ("-0.1", "must fall"), ("nan", "must fall"),
        ("a", "must be numbers"), ("", "must be numbers"), ("0.5,0.4,0.3,0.2", "4 shares for 3 drafts"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            Acceptance.parse(text, 3)


def planned(acceptance: str, **options: Any) -> Plan:
    config = EngineConfig(kv_cache_dtype="fp8", quantization="fp8", **DRAFTING, **options)
    drafts = Acceptance.parse(acceptance, config.num_speculative_tokens)
    model = PlannedModel("nemo", BUILT_IN["nemo"])
    return make_plan(model, find_gpu("h200"), config, Load(1000, 200), acceptance=drafts)


def test_a_plan_has_widths_by_hand() -> None:
    plan = planned("0.6")
    assert list(plan.wide) == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    roofline = Roofline.of(plan.model.config, plan.formats, plan.gpu, plan.efficiencies)
    for batch, rates in plan.wide.items():
        assert set(rates) == {1, *[width for width in (2, 4, 8) if width * batch <= 256]}
        step = roofline.step_seconds(batch, batch * 1100, ())
        assert rates[1] == pytest.approx(batch / step)
        if 2 in rates:
            wide = roofline.step_seconds(batch, batch * 1100, (), 2)
            assert rates[2] == pytest.approx(1.6 * batch / wide) and step <= wide
    one, many = plan.wide[1], plan.wide[64]
    assert one[8] > 2.35 * one[1], "one stream's step is bound by the weights"
    assert many[4] < many[2], "64 rows of 4 tokens are bound by arithmetic"
    assert all(rates[1] == max(rates.values()) for rates in planned("0").wide.values())


def run(shape: dict[str, Any], acceptance: str, spec: str = "requests=40,input=30,output=uniform:1:120") -> Results:
    drafting = {"widths": (2, 4, 8), "num_drafts": 7, "acceptance": Acceptance.parse(acceptance, 7)}
    setting = Setting(dataclasses.replace(SHAPE, **(drafting | shape)), SimpleCost(token=1 / 65536), replicas=2)
    return simulate(generate(WorkloadSpec.parse_text(spec, "x")), Arrivals("poisson", 20.0), setting)


@pytest.mark.parametrize("depth", [1, 2])
def test_the_scheduler_makes_wide_steps_on_a_virtual_clock(depth: int) -> None:
    found = run({"pipeline_depth": depth}, "0.9")
    narrow = run({"pipeline_depth": depth, **NARROW}, "0.9")
    assert found.num_finished == narrow.num_finished == 40
    assert narrow.num_draft_tokens == 0 and found.num_accepted_tokens > 0.6 * found.num_draft_tokens > 500
    assert found.tpot.total < 0.5 * narrow.tpot.total and found.num_steps < 0.8 * narrow.num_steps
    again = run({"pipeline_depth": depth}, "0.9")
    assert {**again.as_json(), "wall_s": 0, "steps_per_wall_s": 0} == {
        **found.as_json(), "wall_s": 0, "steps_per_wall_s": 0
    }  # fmt: skip


def test_preempted_requests_draft_again_and_wrong_drafts_cost_little() -> None:
    found = run({"num_pages": 13, "max_num_seqs": 8}, "0.8")
    assert found.num_finished == 40 and found.num_preemptions > 3 and found.num_accepted_tokens > 100
    wrong, narrow = run({}, "0"), run(NARROW, "0")
    assert wrong.num_finished == 40 and wrong.num_accepted_tokens == 0 < wrong.num_draft_tokens
    assert wrong.tpot.total < 1.03 * narrow.tpot.total


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_the_command_line(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = [command, "nemo", "--gpu", "h200", "--quantization", "fp8", "--max-model-len", "8192"]
    words += ["--synthetic", "requests=4,input=50,output=20", "--rate", "1"] if command == "simulate" else []
    drafting = ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}']
    for lone in (drafting, ["--acceptance", "0.5"]):
        assert main(words + lone) != 0
        assert "go together" in capsys.readouterr().err
    assert main([*words, *drafting, "--acceptance", "0.7,0.6"]) == 0
    told = capsys.readouterr().out
    assert command == "simulate" or ("4: tokens/s" in told and "8: tokens/s" not in told)
