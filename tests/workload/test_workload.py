"""Workload files, generators, arrivals and traces: what is read is what was written, made-up ones repeat, and bad lines
are named.
"""

from __future__ import annotations

import json
import math
import random
import statistics
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.workload import (
    Arrivals,
    Distribution,
    Item,
    Turn,
    WorkloadSpec,
    generate,
    prompt_messages,
    prompt_token_ids,
    read_sharegpt,
    read_workload,
    write_workload,
)

GOOD = {"prompt_tokens": 5, "output_tokens": 3}


def write(tmp_path: Path, *lines: object) -> Path:
    path = tmp_path / "w.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    items = [
        Item("a", (Turn(5, 3, 5),), 0.5),
        Item("b", (Turn("ask", 3),), 0.5, priority=-2),
        Item("c", (Turn("ask", 3, 7),), 1.0),
        Item("d", (Turn((7, 8, 9), 4, 3),), 2.0),
        Item("e", (Turn(({"role": "user", "content": "hé"},), 4),), 2.25),
        Item("f", (Turn(5, 3, 5), Turn(6, 4, 6, 1.5)), 3.0, "p", 20),
        Item("g", (Turn(5, 3, 5, 1.0),), 4.0),
    ]
    path = tmp_path / "w.jsonl"
    assert write_workload(items, path) == 7
    assert list(read_workload(path)) == items
    spec = WorkloadSpec.parse_text(
        "requests=30,input=uniform:1:50,output=choice:1:9,turns=uniform:1:3,prefixes=2,prefix_tokens=9", "x"
    )
    made = list(generate(spec))
    write_workload(made, path)
    assert list(read_workload(path)) == made


def test_a_line_may_stand_for_many(tmp_path: Path) -> None:
    path = write(tmp_path, {"generate": {"requests": 4, "input": "uniform:2:9", "seed": 3}}, "", GOOD)
    items = list(read_workload(path))
    spec = WorkloadSpec.parse({"requests": 4, "input": "uniform:2:9", "seed": 3}, "x")
    assert items[:4] == list(generate(spec)) and items[4] == Item("3", (Turn(5, 3, 5),))


def test_a_million_requests_are_not_held() -> None:
    items = generate(WorkloadSpec(requests=10**9))
    assert len(list(islice(items, 5))) == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "is not a line of JSON"),
        ("[]", r"must be a JSON object, got \[\]"),
        ({"prompt_tokens": 5}, "output_tokens must be an integer from 1 to 10000000, got nothing"),
        (GOOD | {"output_tokens": 0}, "output_tokens must be an integer from 1 to 10000000, got 0"),
        (GOOD | {"output_tokens": True}, "output_tokens must be an integer .* got True"),
        (GOOD | {"prompt_tokens": -1}, "prompt_tokens must be an integer from 1 .* got -1"),
        (GOOD | {"prompt_tokens": 1e99}, "prompt_tokens must be an integer from 1"),
        ({"output_tokens": 3}, "prompt_tokens must be given where there is no prompt"),
        (GOOD | {"prompt": ""}, "prompt must be a text that is not empty, got ''"),
        (GOOD | {"prompt": "a", "messages": []}, "prompt and messages are given, and one is needed"),
        (GOOD | {"prompt_token_ids": [1, -1]}, r"prompt_token_ids\[1\] must be an integer from 0 to 2147483647, got -1"),
        (GOOD | {"prompt_token_ids": []}, r"prompt_token_ids must be a list of at least one token id, got \[\]"),
        (GOOD | {"messages": [{"role": "cat", "content": "x"}]}, r"messages\[0\] must be an object with a role"),
        (GOOD | {"arrival_s": -1}, "arrival_s must be a number of seconds of at least 0, got -1"),
        (GOOD | {"arrival_s": math.nan}, "arrival_s must be a number of seconds of at least 0, got nan"),
        (GOOD | {"arrival_s": 0.5}, r"arrival_s must not be before the line above \(1.0\), got 0.5"),
        (GOOD | {"think_s": 1}, "think_s is not a field here"),
        (GOOD | {"maxtokens": 1}, "maxtokens is not a field here .* got 1"),
        (GOOD | {"prefix": "a"}, "prefix and prefix_tokens go together, got 'a' and 0"),
        (GOOD | {"prompt": "x", "prefix": "a", "prefix_tokens": 3}, "prefix is for prompts given as prompt_tokens"),
        (GOOD | {"id": 7}, "id must be a text that is not empty, got 7"),
        (GOOD | {"priority": "high"}, "priority must be an integer from .* got 'high'"),
        ({"turns": []}, r"turns must be a list of at least one turn, got \[\]"),
        ({"turns": [GOOD, {"prompt_tokens": 5}]}, r"turns\[1\].output_tokens must be an integer"),
        ({"turns": [GOOD, 7]}, r"turns\[1\]: must be a JSON object, got 7"),
        ({"turns": [GOOD], "output_tokens": 4}, "output_tokens is not a field here"),
        ({"generate": {"inputs": 4}}, "generate: inputs is not a field here"),
        ({"generate": {"requests": 0}}, "generate: requests must be an integer of at least 1, got 0"),
        ({"generate": {"input": "uniform:5"}}, "generate: input must be uniform:LOW:HIGH with finite numbers"),
        ({"generate": {"prefixes": 4}}, "generate: prefixes and prefix_tokens go together, got 4 and 0"),
        ({"generate": {}, "id": "x"}, "id must not stand beside generate"),
        ({"generate": 3}, "generate must be a JSON object, got 3"),
    ],
)  # fmt: skip
def test_a_bad_line_is_named(tmp_path: Path, line: object, message: str) -> None:
    path = write(tmp_path, GOOD | {"arrival_s": 1.0}, line)
    with pytest.raises(ValueError, match=f"^{path}:2: {message}"):
        list(read_workload(path))


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no request"):
        list(read_workload(write(tmp_path, "")))
    (tmp_path / "w.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is not text in UTF-8"):
        list(read_workload(tmp_path / "w.jsonl"))
    with pytest.raises(OSError):
        list(read_workload(tmp_path / "nothing"))


@pytest.mark.parametrize(
    ("text", "mean", "low", "high"),
    [("200", 200, 200, 200), ("uniform:50:150", 100, 50, 150), ("normal:300:30:1:1000", 300, 1, 1000),
     ("exponential:80", 80, 1, 5000), ("choice:10:20:60", 30, 10, 60), ("lognormal:100:0.5", 100 * math.exp(0.125), 1, 5000),
     ("lognormal:100:2:90:110", 100, 90, 110)],
)  # fmt: skip
def test_distributions(text: str, mean: float, low: int, high: int) -> None:
    rng = random.Random(1)
    found = Distribution.parse(text, "x")
    draws = [found.draw_count(rng) for _ in range(4000)]
    assert low <= min(draws) and max(draws) <= high
    assert statistics.fmean(draws) == pytest.approx(mean, rel=0.05)
    assert Distribution.parse(str(found), "x") == found and Distribution.parse(200, "x").draw(rng) == 200


@pytest.mark.parametrize(
    "value",
    [
        "",
        "x",
        "uniform:9:2",
        "uniform:1:2:3",
        "normal:1",
        "lognormal:0:1",
        "choice:",
        "-3",
        "nan",
        "inf",
        True,
        None,
        [3],
    ],
)
def test_bad_distributions(value: Any) -> None:
    with pytest.raises(ValueError, match="^tokens must "):
        Distribution.parse(value, "tokens")


@pytest.mark.parametrize(
    ("arrivals", "deviation"),
    [
        (Arrivals("poisson", 50.0), 1.0),
        (Arrivals("constant", 50.0), 0.0),
        (Arrivals("gamma", 50.0, 0.25), 2.0),
        (Arrivals("gamma", 50.0, 4.0), 0.5),
    ],
)
def test_arrivals_have_their_rate_and_repeat(arrivals: Arrivals, deviation: float) -> None:
    times = list(islice(arrivals.times(), 8000))
    gaps = [after - before for before, after in zip(times, times[1:])]
    assert times[0] == 0 and min(gaps) >= 0
    assert statistics.fmean(gaps) == pytest.approx(1 / 50, rel=0.05)
    assert statistics.pstdev(gaps) * 50 == pytest.approx(deviation, rel=0.1, abs=1e-6)
    assert times == list(islice(arrivals.times(), 8000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("poisson",), "rate must be finite and greater than 0 for poisson arrivals, got None"), (("gamma", 1.0, 0.0), "burstiness must"),
     (("closed",), "concurrency must be at least 1"), (("file", 2.0), "rate is not for 'file' arrivals"), (("random", 1.0), "arrivals must be one of"),
     (("constant", math.inf), "rate must be finite"), (("poisson", 1.0, 1.0, 4), "concurrency is for closed arrivals")],
)  # fmt: skip
def test_bad_arrivals(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Arrivals(*arguments)


def test_generated_workloads_repeat_and_differ_by_seed() -> None:
    def made(seed: int) -> list[Item]:
        text = f"requests=200,input=lognormal:100:0.8,output=uniform:5:50,prefixes=3,prefix_tokens=64,prefix_skew=1,turns=uniform:1:4,think_s=exponential:2,seed={seed}"
        return list(generate(WorkloadSpec.parse_text(text, "x")))

    assert made(1) == made(1) != made(2)
    counts = [sum(item.prefix == f"prefix-{index}" for item in made(1)) for index in range(3)]
    assert counts[0] > counts[1] > counts[2] > 0
    assert all(turn.think_s == 0 for item in made(1) for turn in item.turns[:1])


def test_prompts_are_filled_the_same_way_everywhere() -> None:
    first, second = (Item(name, (Turn(30, 4, 30), Turn(5, 4, 5)), None, "p", 40) for name in "ab")
    a, b = prompt_token_ids(first, 0, 6144), prompt_token_ids(second, 0, 6144)
    assert len(a) == 70 and a[:40] == b[:40] and a[40:] != b[40:] and all(1000 <= token < 6144 for token in a)
    assert prompt_token_ids(first, 1, 6144, [[1, 2, 3, 4]])[:74] == [*a, 1, 2, 3, 4]
    assert all(3 <= token < 97 for token in prompt_token_ids(first, 0, 97))
    messages = prompt_messages(first, 1, ["fine"])
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user"]
    assert len(messages[0]["content"].split()) == 40 and messages[2]["content"] == "fine"
    with pytest.raises(ValueError, match="'x': a prompt of token ids is no text"):
        prompt_messages(Item("x", (Turn((1, 2), 3),)), 0)
    with pytest.raises(ValueError, match="'x': a prompt of text has no token ids"):
        prompt_token_ids(Item("x", (Turn("abc", 3),)), 0, 100)


def test_sharegpt(tmp_path: Path) -> None:
    path = tmp_path / "s.json"
    talk = [
        {"from": "human", "value": "a b"},
        {"from": "gpt", "value": "c d e"},
        {"from": "human", "value": "f"},
        {"from": "gpt", "value": "g"},
    ]
    path.write_text(json.dumps([
        {"id": "one", "conversations": talk},
        {"id": "starts with an answer", "conversations": talk[1:]},
        {"id": "empty", "conversations": []},
        {"id": "two", "conversations": [{"from": "system", "value": "s"}, *talk[:2], talk[2]]},
    ]))  # fmt: skip
    count = lambda text: len(text.split())  # noqa: E731
    assert list(read_sharegpt(path, count)) == [Item("one", (Turn("a b", 3, 2),)), Item("two", (Turn("a b", 3, 2),))]
    whole = list(read_sharegpt(path, count, is_multi_turn=True, max_conversations=1))
    assert whole == [Item("one", (Turn("a b", 3, 2), Turn("f", 1, 1)))]
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}]}\n')
    assert list(read_sharegpt(path, count)) == [Item("0", (Turn("a", 2, 1),))]
    for text, message in (
        ("[", "is neither a list of JSON nor lines"),
        ("[3]", r"s.json\[0\]: must be a JSON object, got 3"),
        ('[{"conversations": 3}]', r"s.json\[0\]: conversations must be a list, got 3"),
        ('[{"conversations": [{"from": "human"}]}]', r"s.json\[0\]: conversations\[0\] must have an author and a text"),
        ("[]", "holds no conversation"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(read_sharegpt(path, count))
