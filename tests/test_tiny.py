"""Ten seconds that say whether the engine works at all: text, a chat, a stream, and a served request."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from nemo_engine import AsyncEngine, Engine, SamplingParams
from nemo_engine.server.app import create_app
from nemo_engine.server.options import ServerOptions

PROMPT = "def add(a, b):\n    return"
GREEDY = SamplingParams(temperature=0, max_tokens=8)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("nemo-tiny", device="cpu", max_model_len=512, num_kv_pages=64) as engine:
        yield engine


def test_text(engine: Engine) -> None:
    first, second = engine.generate([PROMPT, PROMPT], GREEDY)
    assert first.outputs[0].text == second.outputs[0].text != ""
    assert len(first.outputs[0].token_ids) <= 8


def test_chat(engine: Engine) -> None:
    (output,) = engine.chat([{"role": "user", "content": "What does len do?"}], GREEDY)
    assert output.finished and output.outputs[0].finish_reason in ("stop", "length")


def test_stream(engine: Engine) -> None:
    (whole,) = engine.generate(PROMPT, GREEDY)
    pieces = [output.outputs[0].text for output in engine.stream(PROMPT, GREEDY)]
    assert "".join(pieces) == whole.outputs[0].text


def test_a_served_request(engine: Engine) -> None:
    (whole,) = engine.generate(PROMPT, GREEDY)
    with AsyncEngine(engine) as served, TestClient(create_app(served, ServerOptions(), model="nemo-tiny")) as client:
        body = {"model": "nemo-tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 8}
        answer = client.post("/v1/completions", json=body, headers={"Host": "localhost"})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == whole.outputs[0].text
        lines = client.post("/v1/completions", json=body | {"stream": True}).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events if event["choices"]) == whole.outputs[0].text
