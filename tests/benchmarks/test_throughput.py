"""``bench throughput``: ours beside transformers on one workload, engines that fail, conversations, and what is
refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.benchmarks import throughput
from nemo_engine.benchmarks.models import SHAPES, open_model
from nemo_engine.benchmarks.prompts import TokenPrompts
from nemo_engine.benchmarks.rooflines import roofline_of
from nemo_engine.benchmarks.timing import Ceilings
from nemo_engine.cli import main
from nemo_engine.config import EngineConfig
from nemo_engine.planner.models import PlannedModel
from nemo_engine.workload import Item, Turn, WorkloadSpec, generate

SMALL = "requests=3,input=uniform:4:12,output=uniform:2:5"
OURS = ("--option", "device=cpu", "--option", "kv_cache_gib=0.05")


def bench(path: Path, *options: object) -> tuple[int, list[dict[str, Any]]]:
    code = main(["bench", "throughput", "nemo-tiny", "--json", str(path), *OURS, *map(str, options)])
    return code, [json.loads(line) for line in path.read_text().splitlines()]


def test_beside_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    peers = ("--peers", "transformers", "transformers-batching", "--option", "transformers.dtype=float32")
    path = tmp_path / "r.jsonl"
    code, found = bench(
        path, "--synthetic", SMALL, "--rounds", 2, "--concurrency", 2, *peers, "--option", "dtype=float32"
    )
    assert code == 0 and [record["engine"] for record in found] == ["nemo_engine", *peers[1:3]]
    ours, generate_, batching = found
    tokens = sum(item.output_tokens for item in generate(WorkloadSpec.parse_text(SMALL, "")))
    for record in found:
        assert record["status"] == "ok" and record["concurrency"] == 2 and len(record["tokens_per_second"]) == 2
        assert record["workload"] == found[0]["workload"] and record["workload"]["new_tokens"] == tokens
        assert record["workload"]["seed"] == 0 and record["commit"] and record["versions"]
    assert ours["options"]["max_num_seqs"] == generate_["options"]["batch"] == 2
    assert batching["options"] == {"max_requests_per_batch": 2}
    assert ours["roofline_fraction"] > 0 and ours["ceilings"]["bytes_per_s"] > 1e8
    assert generate_["equal_before_first_difference"] == 1.0  # both in float32
    median, (low, high) = (
        generate_["nemo_engine_faster_by"]["median"],
        generate_["nemo_engine_faster_by"]["interval"],
    )
    ratios = [a / b for a, b in zip(ours["tokens_per_second"], generate_["tokens_per_second"])]
    assert median == pytest.approx(sum(ratios) / 2) and low == pytest.approx(min(ratios))
    assert high == pytest.approx(max(ratios))
    assert "of the roofline" in capsys.readouterr().out


@pytest.mark.usefixtures("fake_peers")
def test_what_fails_is_failed_and_never_slow(tmp_path: Path) -> None:
    """Also in its last round: what it was before does not count. The others go on."""
    errors = {
        "start": "ValueError: this one does not start",
        "count": "request '2' has 4 new tokens, and 5 were asked for",
        "answers": "2 answers came to 3 prompts",
        "generate:3": "RuntimeError: out of memory",
    }
    names = ["fake", "fake2", "fake3", "fake4"]
    code, found = bench(
        tmp_path / "r.jsonl", "--synthetic", "requests=3,input=4,output=5", "--rounds", 2, "--peers", *names, "other",
        "absent", *(part for name, fails in zip(names, errors) for part in ("--option", f"{name}.fails={fails}")),
    )  # fmt: skip
    assert code == 1
    ours, *fakes, other, absent = found
    for fake, error in zip(fakes, errors.values(), strict=True):
        assert (fake["status"], fake["error"]) == ("failed", error)
        assert not {"tokens_per_second", "nemo_engine_faster_by"} & fake.keys()
    assert ours["status"] == other["status"] == "ok" and len(other["tokens_per_second"]) == 2
    assert absent["status"] == "missing" and "no_such_package is not installed" in absent["error"]


@pytest.mark.usefixtures("fake_peers")
def test_missing_alone_is_no_failure(tmp_path: Path) -> None:
    code, found = bench(
        tmp_path / "r.jsonl", "--synthetic", SMALL, "--rounds", 1, "--warmup", 0, "--peers", "absent=/no/python"
    )
    assert code == 0 and found[1]["error"].endswith("cannot be run: No such file or directory")


@pytest.mark.usefixtures("fake_peers")
def test_points_are_measured_for_themselves_and_a_slow_engine_is_slow(tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    code, found = bench(
        tmp_path / "r.jsonl", "--synthetic", "requests=2,input=4,output=8", "--rounds", 1, "--concurrency", 1, 2,
        "--peers", "fake", "--option", f'fake.calls="{calls}"', "--option", "fake.slow_s=0.5",
    )  # fmt: skip
    assert code == 0 and [(record["engine"], record["concurrency"]) for record in found] == [
        ("nemo_engine", 1), ("fake", 1), ("nemo_engine", 2), ("fake", 2),
    ]  # fmt: skip
    for ours, record in zip(found[::2], found[1::2]):
        assert record["tokens_per_second"][0] <= 32  # 16 tokens in half a second
        faster_by = ours["tokens_per_second"][0] / record["tokens_per_second"][0]
        assert record["nemo_engine_faster_by"]["median"] == pytest.approx(faster_by, rel=1e-3)
    assert [line for line in calls.read_text().splitlines() if line[:5] == "start"] == [
        "start nemo-tiny 1", "start nemo-tiny 2",
    ]  # fmt: skip


@pytest.mark.usefixtures("fake_peers")
def test_a_conversation_goes_on_after_the_engines_own_answers(tmp_path: Path) -> None:
    workload, calls = tmp_path / "w.jsonl", tmp_path / "calls"
    turns = [{"prompt_token_ids": [1, 2000], "output_tokens": 2}, {"prompt_token_ids": [3000], "output_tokens": 3}]
    lines = [{"id": "a", "turns": turns}, {"id": "b", "prompt_token_ids": [1, 4000], "output_tokens": 1}]
    workload.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, found = bench(
        tmp_path / "r.jsonl", "--workload", workload, "--rounds", 1, "--warmup", 0, "--peers", "fake", "--option",
        f'fake.calls="{calls}"',
    )  # fmt: skip
    assert code == 0 and found[1]["workload"]["new_tokens"] == 6 and found[1]["workload"]["turns"] == 3
    said = [line for line in calls.read_text().splitlines() if line != "close"]
    assert said[1:] == [
        "prepare 2", "generate [[1, 2000], [1, 4000]]",
        "prepare 1", "generate [[1, 2000, 2000, 2000, 3000]]", "forget",
    ]  # fmt: skip


def test_texts_and_messages_become_ids() -> None:
    model = open_model("nemo-tiny")
    prompts = TokenPrompts(model.path, model.vocab_size)
    text = Item("t", (Turn("def f(x):", 2), Turn(" return", 2)))
    first = prompts.prompt(text, 0, [])
    assert first[0] == 1 and prompts.prompt(text, 1, [[2000, 2001]])[: len(first) + 2] == [*first, 2000, 2001]
    chat = Item("c", (Turn(({"role": "user", "content": "Hello"},), 2), Turn("More", 2)))
    asked = prompts.prompt(chat, 0, [])
    assert asked[:2] == [1, 3] and asked[-1] == 4  # <s> [INST] ... [/INST]
    assert prompts.prompt(chat, 1, [first[1:]])[-1] == 4
    assert prompts.prompt(Item("n", (Turn(5, 1),)), 0, [])[0] == 1
    assert prompts.prompt(Item("i", (Turn((7, 8), 1),)), 0, []) == [7, 8]
    with pytest.raises(ValueError, match="request 'big': token ids must be below 6144, got 6144"):
        prompts.check([Item("big", (Turn((1, 6144), 1),))])
    with pytest.raises(ValueError, match="request 'mix', turn 1: request 'mix': a prompt of token ids is no text"):
        prompts.check([Item("mix", (chat.turns[0], Turn((7,), 1)))])


def test_the_least_time_of_a_workload() -> None:
    ceilings = Ceilings(1e12, 1e15, 1e15)
    roofline = roofline_of(PlannedModel("nemo", SHAPES["nemo"]), EngineConfig(), ceilings)
    items = [Item(str(i), (Turn(100, 3, 100),)) for i in range(2)]
    step = roofline.step_seconds
    together = step(0, 0, [(0, 100)] * 2) + step(2, 202, []) + step(2, 204, [])
    assert throughput.ideal_seconds(roofline, items, 2) == pytest.approx(together)
    alone = step(0, 0, [(0, 100)]) + step(1, 101, []) + step(1, 102, [])
    assert throughput.ideal_seconds(roofline, items, 1) == pytest.approx(2 * alone)
    # A prefix is computed once, and a second turn only adds to the first.
    shared = [Item(str(i), (Turn(100, 1, 100), Turn(10, 1, 10)), None, "p", 50) for i in range(2)]
    expected = step(0, 0, [(0, 150), (50, 100)]) + step(0, 0, [(151, 10)] * 2)
    assert throughput.ideal_seconds(roofline, shared, 8) == pytest.approx(expected)


def test_agreement_counts_up_to_the_first_difference() -> None:
    assert throughput.agreement([[1, 2, 3], [4]], [[1, 9, 3], [4]]) == pytest.approx(2 / 4)
    assert throughput.agreement([[1]], [[1]]) == 1.0


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--concurrency", "0"), "--concurrency must be at least 1, got 0"),
        (("--rounds", "0"), "--rounds must be at least 1, got 0"),
        (("--concurrency", "2", "--option", "max_num_seqs=2"), "nemo_engine.max_num_seqs and --concurrency say the same"),
        (("--option", "bogus=1"), "bogus"),
        (("--option", "page_size=7"), "page_size must be from 16 to 256, got 7"),
        (("--option", "vllm.seed=1"), "--option names 'vllm', which does not run here"),
        (("--peers", "nothing"), "got 'nothing'"),
        (("--peers", "vllm", "vllm=python"), "--peers names vllm twice"),
        (("--synthetic", "requests=0"), "--synthetic: requests must be an integer of at least 1, got 0"),
        (("--log", "/no/folder/log"), "--log /no/folder/log: there is no directory /no/folder"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options: tuple[str, ...], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "throughput", "nemo-tiny", "--option", "device=cpu", *options]) == 2
    assert error in capsys.readouterr().err


def test_a_bad_line_of_a_workload_is_refused_with_its_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.jsonl"
    path.write_text('{"prompt_tokens": 4, "output_tokens": 2}\n\n{"prompt_tokens": 4, "output_tokens": "two"}\n')
    assert main(["bench", "throughput", "nemo-tiny", "--workload", str(path)]) == 2
    assert f"{path}:3: output_tokens must be an integer" in capsys.readouterr().err
