"""``nemo-engine plan`` and ``simulate``: what they print and write, without torch, and how bad input is told."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nemo_engine.cli import main
from nemo_engine.simulator import CostModel, Measurement

PLAN = ["plan", "nemo", "--gpu", "h200"]
SIMULATE = ["simulate", "nemo", "--gpu", "h200", "--synthetic", "requests=40,input=300,output=20"]


def test_a_plan(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    options = [
        "--quantization",
        "fp8",
        "--kv-cache-dtype",
        "fp8",
        "--context",
        "32768",
        "--input",
        "2000",
        "--output",
        "200",
    ]
    limits = [
        "--slo-ttft",
        "1s",
        "--slo-itl",
        "30ms",
        "--price-per-hour",
        "3.5",
        "--currency",
        "EUR",
        "-v",
        "--json",
        str(file),
    ]
    assert main([*PLAN, *options, *limits]) == 0
    out, err = capsys.readouterr()
    for text in ("weights", "KV cache: 81,920 bytes per token", "requests of 32,768, the whole context", "tokens/s", "EUR per million output tokens",
                 "TTFT of at most 1000 ms and ITL of at most 30 ms: up to", "assumed:"):  # fmt: skip
        assert text in out
    data = json.loads(file.read_text())
    assert data["fits"] and data["max_model_len"] == 32768 and data["memory_bytes"]["weights"] == 13_597_583_360
    assert data["best"]["itl_s"] <= 0.03 and data["best"]["cost_per_million_output_tokens"] > 0
    assert all(
        figure["source"].startswith(("assumed", "derived", "measured")) for figure in data["efficiencies"].values()
    )
    assert err == ""
    assert re.match(r"YES: nemo on NVIDIA H200 SXM: one request gets \d+ tokens/s .* keep the limits", out)
    assert main(PLAN) == 0
    short = capsys.readouterr().out
    assert "assumed:" not in short and "this engine has not been measured on it yet" in short
    assert re.search(r"accuracy: against \d+ published results on this GPU, .* off by -?\+?\d+%", short)


@pytest.mark.parametrize("model", ["nemo-tiny", "mistral-7b-v0.3", "minitron-8b"])
@pytest.mark.parametrize("gpu", ["h200", "l40s", "b200"])
def test_other_models_and_gpus(model: str, gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", model, "--gpu", gpu, "--input", "100"]) == 0
    assert "together" in capsys.readouterr().out


def test_several_gpus_are_a_table(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plans.json"
    argv = ["plan", "--gpu", "h200", "a100,l4", "nemo", "--quantization", "fp8", "--price-per-hour", "4,2,1"]
    assert main([*argv, "--json", str(file)]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    assert rows["h200"][2:4] == ["HBM3e", "yes"] and rows["a100"][3] == "no" and rows["l4"][3] == "yes"
    assert (
        "a100: FP8 needs compute capability 8.9" in out
        and "74 published results on h100, h200, a100, l40s, promised" in out
    )
    h200, a100, l4 = json.loads(file.read_text())
    assert h200["load"]["price_per_hour"] == 4 and l4["load"]["price_per_hour"] == 1 and "FP8" in a100["error"]
    assert main(["plan", "nemo", "--gpu", "l4", "rtx3090"]) == 1


def test_a_published_repository_needs_no_network(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert main(["plan", "mistralai/Mistral-Nemo-Instruct-2407", "--gpu", "h200"]) == 0
    assert "131,072" in capsys.readouterr().out


def test_the_verdict_of_a_sweep(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["simulate", "nemo", "--gpu", "h200", "--synthetic", "requests=200,input=300,output=100"]
    assert main([*argv, "--rate", "2", "100", "--arrivals", "constant"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    near = float(re.match(r"saturates near ([\d.]+) requests/s; at most", first)[1])
    assert 10 < near < 90
    assert main([*argv, "--rate", "2", "--arrivals", "constant", "--slo-itl", "1us"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("keeps up with 2 requests/s; ") and "keep the limits at no rate" in out
    assert "has not been measured on it yet" in out
    assert main([*argv, "--rate", "1e6"]) == 0
    assert capsys.readouterr().out.startswith("too few requests to judge a rate")


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", "nemo", "--gpu", "rtx4090", "--json", str(file)]) == 1
    out = capsys.readouterr().out
    assert "does not fit into the device's memory, by 4." in out and "what would fit instead: quantization=fp8" in out
    assert json.loads(file.read_text())["missing_gib"] > 4
    assert main(["plan", "nemo", "--gpu", "rtx4090", "--memory-gib", "40"]) == 0
    assert main(["plan", "nemo", "--gpu", "rtx4090", "--tp", "2"]) == 0
    assert "this version of the engine runs on one GPU" in capsys.readouterr().out


def test_no_torch_is_imported() -> None:
    for argv in (PLAN, SIMULATE + ["--rate", "5"]):
        code = (
            f"import sys; from nemo_engine.cli import main; main({argv!r}); print([n for n in ('torch', 'numpy') if n "
            "in sys.modules])"
        )
        run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["plan", "nemo", "--gpu", "h900"], "gpu must be one of h200, "),
        (["plan", "nemo", "--gpu", "h200", "--currency", "EUR"], "--currency is that of --price-per-hour"),
        ([*PLAN, "--price-per-hour", "1", "2"], "--price-per-hour takes one price, or one for each GPU, got 2 for 1"),
        (["plan", "nemo"], "required: --gpu"),
        (["plan", "no/such/model", "--gpu", "h200"], "'no/such/model' does not exist"),
        ([*PLAN, "--input", "0"], "input_tokens must be an integer of at least 1, got 0"),
        ([*PLAN, "--input", "200000"], "input 200000 and output 200 make 200200 tokens"),
        ([*PLAN, "--context", "200000"], "max_model_len must be at most the checkpoint's max_position_embeddings "
                                         "(131072)"),
        ([*PLAN, "--context", "100", "--max-model-len", "200"], "--context and --max-model-len are the same"),
        ([*PLAN, "--tp", "3"], "tensor_parallel_size must divide num_heads (32), got 3"),
        ([*PLAN, "--slo-itl", "30 parsecs"], "a time above 0 such as 30ms or 1.5s is needed, got '30 parsecs'"),
        ([*PLAN, "--slo-itl", "0ms"], "a time above 0"),
        ([*PLAN, "--price-per-hour", "-1"], "price_per_hour must be finite and greater than 0, got -1.0"),
        ([*PLAN, "--memory-gib", "0.1"], "--memory-gib must be from 0.6"),
        ([*PLAN, "--json", "/no/such/folder/x.json"], "--json /no/such/folder/x.json: there is no directory"),
        ([*PLAN, "--results", "/no/such/folder"], "--results must be a directory"),
        (["plan", "nemo", "--gpu", "a100", "--kv-cache-dtype", "fp8"], "FP8 needs compute capability 8.9"),
        ([*PLAN, "--page-size", "48"], "page_size must be a power of two"),
        (["simulate", "nemo", "--synthetic", "requests=3"], "give a --gpu, a --cost-model, or both"),
        (["simulate", "nemo", "--gpu", "h200"], "give a --workload file or a --synthetic specification"),
        ([*SIMULATE, "--workload", "x"], "give a --workload file or a --synthetic specification"),
        (SIMULATE, "has no arrival_s: give a rate or a concurrency"),
        ([*SIMULATE, "--rate", "0"], "numbers above 0 are needed, with spaces or commas between them, got '0'"),
        ([*SIMULATE, "--rate", "5", "--concurrency", "4"], "--concurrency is a closed loop"),
        ([*SIMULATE, "--rate", "5", "--arrivals", "poisson", "--burstiness", "0.5"], "--burstiness is for gamma "
                                                                                     "arrivals"),
        ([*SIMULATE, "--arrivals", "constant"], "--arrivals constant needs a --rate"),
        ([*SIMULATE, "--rate", "5", "--arrivals", "file"], "--rate is not for the file's own arrivals, got 5"),
        ([*SIMULATE, "--rate", "5", "--replicas", "0"], "replicas must be at least 1, got 0"),
        ([*SIMULATE, "--rate", "5", "--routing", "random"], "invalid choice: 'random'"),
        ([*SIMULATE, "--rate", "5", "--requests", "0"], "--requests must be at least 1, got 0"),
        ([*SIMULATE, "--rate", "5", "--plot", "x.pdf"], "--plot must end in .png or .svg, got x.pdf"),
        ([*SIMULATE, "--rate", "5", "--scheduling-policy", "lifo"], "scheduling_policy must be one of"),
        ([*SIMULATE[:-1], "inputs=3", "--rate", "5"], "--synthetic: inputs is not a field here"),
        ([*SIMULATE[:-1], "input", "--rate", "5"], "--synthetic: NAME=VALUE,... is needed, got 'input'"),
        ([*SIMULATE[:4], "--workload", "/no/such/file", "--rate", "5"], "--workload must be a file, got '/no/such/file'"),
        (["simulate", "nemo", "--gpu", "rtx4090", "--synthetic", "requests=1", "--rate", "1"], "does not fit into the "
                                                                                               "device's memory"),
        ([*SIMULATE, "--rate", "5", "--cost-model", "/no/such/file"], "/no/such/file"),
    ],
)  # fmt: skip
def test_bad_input(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(argv)
    except SystemExit as end:
        code = int(end.code or 0)
    err = capsys.readouterr().err
    assert code == 2 and message in err and err.count("\n") == 1


def test_a_simulation(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "out.json"
    workload = tmp_path / "w.jsonl"
    workload.write_text(
        '{"generate": {"requests": 60, "input": 200, "output": 30, "prefixes": 2, "prefix_tokens": 640}}\n'
    )
    argv = [
        "simulate",
        "nemo",
        "--gpu",
        "h200",
        "--workload",
        str(workload),
        "--replicas",
        "2",
        "--routing",
        "prefix-aware",
    ]
    for suffix in (".png", ".svg"):
        image = tmp_path / f"out{suffix}"
        more = ["--rate", "5,500", "--slo-ttft", "50ms", "--json", str(file), "--plot", str(image)]
        assert main([*argv, *more]) == 0
        assert image.stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "requests/s" in out and "prefix hits" in out and "steps" in out
    data = json.loads(file.read_text())
    slow, fast = data["runs"]
    assert slow["rate"] == 5 and slow["num_finished"] == fast["num_finished"] == 60
    assert slow["prefix_hit_rate"] > 0.5 and slow["ttft_s"]["p99"] < fast["ttft_s"]["p99"]
    assert data["engine"]["page_size"] == 64 and data["engine"]["pipeline_depth"] == 2
    assert (
        main(
            [
                *SIMULATE,
                "--concurrency",
                "1,4",
                "--no-enable-prefix-caching",
                "--max-num-seqs",
                "2",
                "--json",
                str(file),
            ]
        )
        == 0
    )
    assert [run["concurrency"] for run in json.loads(file.read_text())["runs"]] == [1, 4]


def test_a_fitted_model_and_texts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model, workload = tmp_path / "cost.json", tmp_path / "w.jsonl"
    steps = [Measurement(n, 100 * n, 0, 0, 0, 1e-3 + n * 1e-4) for n in range(1, 20)]
    steps += [Measurement(0, 0, 1, n, n * n // 2, 2e-3 + n * 1e-5) for n in range(1, 400, 20)]
    CostModel.fit(steps).save(model)
    lines = [{"prompt": "The heapq module", "output_tokens": 9, "arrival_s": 0},
             {"messages": [{"role": "user", "content": "Hello"}], "output_tokens": 4, "arrival_s": 1.5}]  # fmt: skip
    workload.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["simulate", "nemo-tiny", "--cost-model", str(model), "--workload", str(workload)]) == 0
    assert "1,024 s" not in capsys.readouterr().out
    assert main(["simulate", "nemo", "--gpu", "h200", "--cost-model", str(model), "--workload", str(workload)]) == 2
    assert "a prompt of text needs prompt_tokens" in capsys.readouterr().err
    workload.write_text('{"prompt_tokens": 5, "output_tokens": 3}\n{"prompt_tokens": "x", "output_tokens": 3}\n')
    assert main(["simulate", "nemo", "--gpu", "h200", "--workload", str(workload), "--rate", "1"]) == 2
    assert f"{workload}:2: prompt_tokens must be an integer from 1" in capsys.readouterr().err


def test_a_sharegpt_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "a" * 400}, {"from": "gpt", "value": "b" * 80}] * 2
    (tmp_path / "s.json").write_text(json.dumps([{"id": "x", "conversations": talk}] * 5))
    file = tmp_path / "out.json"
    for model in ("nemo", "nemo-tiny"):
        assert (
            main(
                [
                    "simulate",
                    model,
                    "--gpu",
                    "h200",
                    "--workload",
                    str(tmp_path / "s.json"),
                    "--concurrency",
                    "2",
                    "--json",
                    str(file),
                ]
            )
            == 0
        )
        (found,) = json.loads(file.read_text())["runs"]
        assert found["num_finished"] == 10
        if model == "nemo":  # 100 tokens and 220
            assert found["prompt_tokens_per_s"] * found["duration_s"] == pytest.approx(5 * 320)


def test_the_scheduling_policy_is_simulated(tmp_path: Path) -> None:
    workload, file = tmp_path / "w.jsonl", tmp_path / "out.json"
    lines = [
        {"prompt_tokens": 50, "output_tokens": 400 if index % 2 else 1, "priority": index % 2, "arrival_s": 0}
        for index in range(60)
    ]
    workload.write_text("".join(json.dumps(line) + "\n" for line in lines))
    argv = [
        "simulate",
        "nemo",
        "--gpu",
        "h200",
        "--workload",
        str(workload),
        "--max-num-seqs",
        "2",
        "--json",
        str(file),
    ]
    waits = {}
    for policy in ("fcfs", "priority"):
        assert main([*argv, "--scheduling-policy", policy]) == 0
        (found,) = json.loads(file.read_text())["runs"]
        waits[policy] = found["queue_s"]["p50"]
    assert waits["priority"] < 0.2 * waits["fcfs"]
