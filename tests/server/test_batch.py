"""Batch files over a real engine: the routes' own answers, defaults, bad requests, the cache, the command."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from nemo_engine import Engine, SamplingParams
from nemo_engine.cli import main
from nemo_engine.engine.async_engine import EngineDeadError
from nemo_engine.engine.base import BaseEngine
from nemo_engine.server.protocol import ApiRequest, ChatRequest, CompletionRequest
from nemo_engine.server.responses.protocol import ResponsesRequest
from tests.batch.kills import results, union
from tests.server.live import ENGINE_OPTIONS, LiveServer

SHARED = "The quick brown fox jumps over the lazy dog. " * 12


@pytest.fixture(scope="module")
def offline() -> Iterator[Engine]:
    with Engine("nemo-tiny", **ENGINE_OPTIONS) as engine:
        yield engine


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def by_id(path: Path) -> dict[str, Any]:
    return {result["custom_id"]: result for result in results(path)}


CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 6, "seed": 3, "temperature": 1.0}
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CHAT | {"logprobs": True, "n": 2},
    "/v1/completions": {"prompt": ["def f(", "x = "], "max_tokens": 5, "seed": 1, "temperature": 0.8, "logprobs": 1},
    "/v1/responses": {"input": "Say something", "max_output_tokens": 5, "seed": 2},
}


def without_ids(body: dict[str, Any]) -> dict[str, Any]:
    text = json.dumps(
        {name: value for name, value in body.items() if not name.startswith(("id", "created", "usage", "completed"))}
    )
    return {
        name: value
        for name, value in json.loads(text, parse_float=lambda number: round(float(number), 4)).items()
        if name != "output"
    } | {"texts": [part.get("content") for part in body.get("output", [])]}


def test_a_body_means_here_what_it_means_to_the_server(offline: Engine, live: LiveServer, tmp_path: Path) -> None:
    lines = [{"custom_id": url, "method": "POST", "url": url, "body": body} for url, body in BODIES.items()]
    summary = offline.batch(write(tmp_path / "in", lines), tmp_path / "out")
    assert (summary.num_answered, summary.num_failed) == (3, 0)
    found = by_id(tmp_path / "out")
    for url, body in BODIES.items():
        response = found[url]["response"]
        direct = httpx.post(live.url + url, json=body).json()
        assert response["status_code"] == 200 and response["request_id"] == response["body"]["id"]
        ours, theirs = without_ids(response["body"]), without_ids(direct)
        assert ours.pop("model") == "nemo-tiny" == theirs.pop("model") == "nemo-tiny"
        assert ours == theirs


def test_what_fails_and_why(offline: Engine, tmp_path: Path) -> None:
    bodies: list[dict[str, Any]] = [
        CHAT | {"model": "gpt-4"}, CHAT | {"stream": True}, CHAT | {"temperature": "hot"}, CHAT | {"max_tokens": 10**6},
        CHAT | {"tools": 5}, {"messages": []}, {"prompt": "x"}, CHAT | {"model": "named"},
    ]  # fmt: skip
    lines = [
        {"custom_id": f"{index}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        for index, body in enumerate(bodies)
    ]
    summary = offline.batch(write(tmp_path / "in", lines), tmp_path / "out", served_model_name="named")
    failed = {result["line"]: result for result in results(tmp_path / "out.errors")}
    assert list(by_id(tmp_path / "out")) >= ["7"] and summary.num_failed == len(failed)
    wanted = {
        1: "the model 'gpt-4' does not exist",
        2: "stream must be false",
        3: "temperature",
        5: "tools",
        6: "messages",
        7: "messages",
    }
    for line, says in wanted.items():
        error = failed[line]["error"]
        assert says in error["message"] and error["code"]
        assert failed[line]["response"]["body"]["error"]["message"] == error["message"]
    assert failed[1]["response"]["status_code"] == 404 and failed[1]["error"]["code"] == "model_not_found"


def test_no_value_of_any_field_is_the_servers_fault(offline: Engine, tmp_path: Path) -> None:
    models: dict[str, type[ApiRequest]] = {
        "/v1/chat/completions": ChatRequest, "/v1/completions": CompletionRequest, "/v1/responses": ResponsesRequest
    }  # fmt: skip
    names = sorted({name for model in models.values() for name in model.model_fields})  # of all routes, for each
    values = [
        "abc",
        "",
        10**400,
        -(10**400),
        2.5,
        -1,
        0,
        True,
        [],
        ["a"],
        [[]],
        [10**400],
        {},
        {"5": 10**400},
        {"a": {}},
    ]
    least = {
        url: {n: v for n, v in body.items() if n in ("messages", "prompt", "input")} for url, body in BODIES.items()
    }
    bodies = [(url, least[url] | {name: value}) for url in models for name in names for value in values]
    lines = [{"custom_id": f"{i}", "method": "POST", "url": u, "body": b} for i, (u, b) in enumerate(bodies)]
    summary = offline.batch(write(tmp_path / "in", lines), tmp_path / "out", SamplingParams(max_tokens=1))
    assert summary.num_done == len(bodies)
    ours = [result for result in results(tmp_path / "out.errors") if result["response"]["status_code"] >= 500]
    assert [bodies[result["line"] - 1] for result in ours] == []


def test_the_same_tokens_as_generate_and_defaults_for_lines_without_their_own(offline: Engine, tmp_path: Path) -> None:
    params = SamplingParams(max_tokens=9, temperature=1.0, seed=5)
    prompts = [f"{SHARED} number {index}:" for index in (3, 1, 2)]
    outputs = [output.outputs[0].text for output in offline.generate(prompts, params)]
    offline.reset_prefix_cache()
    lines = [{"prompt": prompt} for prompt in prompts] + [{"prompt": prompts[0], "max_tokens": 2}]
    sampling = {"max_tokens": 9, "temperature": 1.0, "seed": 5}
    summary = offline.batch(write(tmp_path / "in", lines), tmp_path / "out", sampling)
    found = by_id(tmp_path / "out")
    texts = [found[f"line-{number}"]["response"]["body"]["choices"][0]["text"] for number in (1, 2, 3, 4)]
    assert texts[:3] == outputs and outputs[0].startswith(texts[3]) and len(texts[3]) < len(outputs[0])
    assert summary.num_output_tokens == 29 and summary.num_cached_tokens > summary.num_prompt_tokens / 2
    assert "from the prefix cache" in str(summary)
    assert offline.generate("x", params)[0].finished  # the engine is still its caller's

    async def in_a_notebook() -> int:
        return offline.batch(tmp_path / "in", tmp_path / "again", sampling).num_answered

    assert asyncio.run(in_a_notebook()) == 4


def test_the_engine_does_not_run_dry_between_windows(offline: Engine, tmp_path: Path) -> None:
    """As many steps as for the same requests in one list, and every one of them as full."""
    count, params = 6 * offline.config.max_num_seqs, SamplingParams(max_tokens=5, ignore_eos=True, seed=1)
    prompts = [f"{index:03}" for index in range(count)]
    before = offline.last_step_id
    offline.generate(prompts, params)
    alone = offline.last_step_id - before
    lines = [{"prompt": prompt, "max_tokens": 5, "ignore_eos": True, "seed": 1} for prompt in prompts]
    offline.batch(write(tmp_path / "in", lines), tmp_path / "out")
    assert offline.last_step_id - before - alone <= alone + 1


def test_other_threads_may_use_the_engine_meanwhile(
    offline: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=6, seed=4, temperature=1.0)
    wanted = offline.generate("def f(", params)[0].outputs[0].text
    lines = [{"prompt": f"{index}", "max_tokens": 1 + index % 3, "seed": index} for index in range(240)]
    write(tmp_path / "in", lines)
    offline.batch(tmp_path / "in", tmp_path / "alone")
    step = offline._core.step
    monkeypatch.setattr(offline._core, "step", lambda: [time.sleep(0.001), step()][1])  # so that the other one waits
    is_over = threading.Event()
    texts: set[str] = set()

    def generate() -> None:
        while not is_over.is_set():
            texts.add(offline.generate("def f(", params)[0].outputs[0].text)

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    batch = threading.Thread(target=lambda: offline.batch(tmp_path / "in", tmp_path / "beside"), daemon=True)
    batch.start()
    batch.join(60)
    is_over.set()
    thread.join(60)
    assert not batch.is_alive() and not thread.is_alive(), "one waits for the other"
    assert texts == {wanted} and union(tmp_path / "beside") == union(tmp_path / "alone")


def test_a_dead_engine_ends_the_run_which_can_be_gone_on_with(
    offline: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count = 6 * offline.config.max_num_seqs
    write(tmp_path / "in", [{"prompt": f"{index}", "max_tokens": 3, "ignore_eos": True} for index in range(count)])
    steps = 0

    def advance(engine: Engine) -> None:
        nonlocal steps
        steps += 1
        if steps > 5:
            raise RuntimeError("the device is lost")
        BaseEngine.advance(engine)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "advance", advance)
        patch.setattr(Engine, "is_dead", True)
        with pytest.raises(EngineDeadError, match="the device is lost"):
            offline.batch(tmp_path / "in", tmp_path / "out")
    summary = offline.batch(tmp_path / "in", tmp_path / "out")
    assert summary.num_resumed and summary.num_done == count == len(by_id(tmp_path / "out"))


def test_sampling_that_changes_an_answers_form_stands_in_the_line(offline: Engine, tmp_path: Path) -> None:
    source = write(tmp_path / "in", [{"prompt": "x"}])
    with pytest.raises(ValueError, match="logprobs must stand in the lines"):
        offline.batch(source, tmp_path / "out", SamplingParams(logprobs=2))
    with pytest.raises(ValueError, match="temperature"):
        offline.batch(source, tmp_path / "out", {"temperature": -1})
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ["--device", "cpu", "--num-kv-pages", "60", "--max-num-seqs", "4", "--max-model-len", "200"]
    url = "/v1/completions"
    lines = [{"custom_id": "a", "method": "POST", "url": url, "body": {"model": "nemo-tiny", "prompt": "x", "odd": 1}}]
    source, target = str(write(tmp_path / "in", lines)), str(tmp_path / "out")
    Path(source).write_bytes(b"\xef\xbb\xbf" + Path(source).read_bytes())  # a byte order mark, as some editors write it
    assert main(["batch", source, target, *flags, "--seed", "1"]) == 0
    said = capsys.readouterr()
    assert "1 answered, 0 failed" in said.err and "no effect, here and wherever else they stand: odd" in said.err
    assert said.out == ""
    assert main(["batch", "nemo-tiny", source, target, *flags, "--seed", "2"]) == 2
    assert "seed was 1 and is 2" in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr("nemo_engine.server.batch.answers.BaseEngine", None)  # what is wrong costs no load
        assert main(["generate", "nemo-tiny", "--input", source]) == 2
        assert main(["generate", "nemo-tiny", "--input", source, "--output", target, "--json"]) == 2
        assert main(["batch", "nemo-tiny", str(tmp_path / "none"), target]) == 2
        assert main(["batch", source, target, "--logprobs", "1"]) == 2
        assert main(["batch", source, target, "--served-model-name", ""]) == 2
    Path(source).write_text('{"prompt": "x"}\n{')
    made = str(tmp_path / "made")
    assert main(["generate", "nemo-tiny", "--input", source, "--output", made, *flags, "--max-tokens", "3"]) == 1
    assert "1 answered, 1 failed" in capsys.readouterr().err
    assert sum(union(Path(made)).values()) == 2 and Path(f"{made}.errors").exists()
    assert results(Path(made))[0]["response"]["body"]["usage"]["completion_tokens"] == 3
