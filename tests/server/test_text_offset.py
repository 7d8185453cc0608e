"""``text_offset`` of completions: a token of whole characters stands in the text where it is said to, streamed or
whole.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import httpx
import pytest

from nemo_engine.server.logprobs import TextOffsets
from nemo_engine.text import load_tokenizer
from tests.server.live import LiveServer

SCRIPTS = [
    "def f(x):\n    return x",
    "Grüße aus Köln, ",
    "日本語の文字です。",
    "Привет, мир! ",
    "😀👩‍👩‍👧 ok 🇩🇪",
    "שלום עולם",
    "<s>a",
    " \t\n  ",
]


def choice_of(live: LiveServer, body: dict[str, Any]) -> dict[str, Any]:
    answer = httpx.post(live.url + "/v1/completions", json=body, timeout=600)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def streamed(live: LiveServer, body: dict[str, Any]) -> dict[str, Any]:
    """The choices of a stream put together."""
    text, lists = "", {"text_offset": [], "tokens": [], "token_logprobs": []}
    lines = httpx.post(live.url + "/v1/completions", json=body | {"stream": True}, timeout=600).text.split("\n")
    for line in lines:
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                text += choice["text"]
                for name in lists:
                    lists[name] += (choice["logprobs"] or {name: []})[name]
    return {"text": text, "logprobs": lists}


TOKENIZER = load_tokenizer(Path(__file__).parents[2] / "nemo_engine/assets/nemo-tiny")
HIDDEN = {TOKENIZER.special_text(i) for i in range(TOKENIZER.vocab_size) if TOKENIZER.is_special(i)}


def misplaced(choice: dict[str, Any], but: set[str] = HIDDEN) -> list[tuple[int, str, str]]:
    """Tokens of whole characters that do not stand where they are said to; those that a stop string cut off stand
    nowhere.
    """
    text, logprobs = choice["text"], choice["logprobs"]
    return [
        (offset, token, text[offset : offset + len(token)])
        for offset, token in zip(logprobs["text_offset"], logprobs["tokens"])
        if "\ufffd" not in token and token not in but and offset + len(token) <= len(text)
        if text[offset : offset + len(token)] != token
    ]


@pytest.mark.parametrize("prompt", SCRIPTS)
def test_echoed_prompts(live: LiveServer, prompt: str) -> None:
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": 3, "temperature": 0}
    choice = choice_of(live, body)
    assert choice["text"].startswith(prompt) and misplaced(choice) == []
    assert choice["logprobs"]["tokens"][0] == "<s>" and choice["logprobs"]["text_offset"] == sorted(
        choice["logprobs"]["text_offset"]
    )
    named = choice_of(live, body | {"return_tokens_as_token_ids": True})
    assert named["logprobs"]["text_offset"] == choice["logprobs"]["text_offset"]
    assert named["logprobs"]["tokens"][0] == "token_id:1"
    only = choice_of(live, body | {"max_tokens": 0})
    assert only["text"] == prompt and misplaced(only) == []


def test_streams_say_what_the_whole_says(live: LiveServer) -> None:
    """Whatever is held back for a stop string or an incomplete character; with tokens of bytes among them."""
    draw = random.Random(3)
    for seed in range(12):
        body: dict[str, Any] = {
            "prompt": draw.choice(SCRIPTS[:6]), "max_tokens": 24, "temperature": 1.5, "seed": seed, "logprobs": 1,
            "ignore_eos": seed % 2 == 0, "skip_special_tokens": seed % 3 > 0,
            # Bytes by themselves are rare: these are given a chance.
            "logit_bias": {str(token_id): draw.choice([0, 4, 8]) for token_id in draw.sample(range(1000, 1256), 40)},
        }  # fmt: skip
        if seed % 4:
            body["stop"] = [draw.choice(["zzzzzzzz", "e", "\n\n", "the"])]
        whole, parts = choice_of(live, body), streamed(live, body)
        assert parts["text"] == whole["text"]
        for name in ("text_offset", "tokens", "token_logprobs"):
            assert parts["logprobs"][name] == whole["logprobs"][name], (seed, name)
        hidden = HIDDEN if body["skip_special_tokens"] else {"</s>"}
        assert misplaced(whole, hidden) == [] and misplaced(parts, hidden) == []


def test_incomplete_and_wrong_bytes() -> None:
    tokenizer = TOKENIZER
    byte = {tokenizer.token_bytes(i): i for i in range(tokenizer.vocab_size) if len(tokenizer.token_bytes(i)) == 1}

    def offsets(data: bytes) -> list[int]:
        places = TextOffsets(tokenizer)
        return [places.take(byte[bytes([value])]) for value in data]

    assert offsets("aé😀b".encode()) == [0, 1, 1, 2, 2, 2, 2, 3]
    assert offsets(b"\xe2a\xff\xffb") == [0, 1, 2, 3, 4]  # U+FFFD for each run that is no character
    places = TextOffsets(tokenizer, start=7)
    assert [places.take(i) for i in (1, byte[b"a"], 2, byte[b"b"])] == [7, 7, 8, 8]
    shown = TextOffsets(tokenizer, skips_special=False)
    assert [shown.take(i) for i in (1, byte[b"a"], 2)] == [0, 3, 4]
