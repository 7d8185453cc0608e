"""A lone surrogate is no text: whatever takes text refuses it by its place, and nothing becomes U+FFFD in silence."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from nemo_engine import Engine, SamplingParams

BAD = "ok \udcff"


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine("nemo-tiny", device="cpu", num_kv_pages=8, max_model_len=128) as engine:
        yield engine


def tool(**function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", **function}}


def asks(*, content: Any = "hi", **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **options}


def answers(**message: Any) -> dict[str, Any]:
    user = {"role": "user", "content": "hi"}
    return {"messages": [user, {"role": "assistant", **message}, {"role": "user", "content": "go on"}]}


def called(arguments: Any) -> list[dict[str, Any]]:
    return [{"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": arguments}}]


@pytest.mark.parametrize(
    ("options", "place"),
    [
        (asks(content=BAD), r"messages\[0\].content"),
        (asks(content=[{"type": "text", "text": "ok"}, {"type": "text", "text": BAD}]), r"messages\[0\].content\[1\].text"),
        (answers(content=BAD), r"messages\[1\].content"),
        (answers(refusal=BAD), r"messages\[1\].refusal"),
        (answers(tool_calls=called(BAD)), r"messages\[1\].tool_calls\[0\].function.arguments"),
        (answers(tool_calls=called({"a": BAD})), r"messages\[1\].tool_calls\[0\].function.arguments"),
        (answers(tool_calls=called('{"a": "\\ud800"}')), r"messages\[1\].tool_calls\[0\].function.arguments"),
        (asks(tools=[tool(description=BAD)]), r"tools\[0\].function.description"),
        (asks(tools=[tool(parameters={"type": "object", "properties": {BAD: {}}})]), r"tools\[0\].function.parameters"),
    ],
)  # fmt: skip
def test_conversations(engine: Engine, options: dict[str, Any], place: str) -> None:
    with pytest.raises(ValueError, match=rf"^{place} must be Unicode text: character \d+ is the lone surrogate"):
        engine.chat(**options)


def test_prompts_and_parameters(engine: Engine) -> None:
    surrogate = "must be Unicode text: character 3 is the lone surrogate"
    with pytest.raises(ValueError, match=rf"prompts\[1\].* {surrogate}"):
        engine.generate(["ok", BAD])
    with pytest.raises(ValueError, match=surrogate):
        engine.generate({"prompt_token_ids": [1, 2], "cache_salt": BAD})
    with pytest.raises(ValueError, match=f"stop {surrogate}"):
        SamplingParams(stop=["ok", BAD])
    with pytest.raises(ValueError, match=f"bad_words {surrogate}"):
        engine.generate("ok", SamplingParams(bad_words=[BAD]))
    for form in ({"choice": ["a", BAD]}, {"regex": BAD}, {"json": {"const": BAD}}, {"json": {"title": "\ud800"}}):
        with pytest.raises(ValueError):
            engine.generate("ok", SamplingParams(structured_outputs=form, max_tokens=2))
    assert engine.tokenizer is not None
    with pytest.raises(ValueError, match=f"text {surrogate}"):
        engine.tokenizer.encode(BAD)


def test_characters_beyond_16_bits_are_text(engine: Engine) -> None:
    (output,) = engine.chat([{"role": "user", "content": "\U0001f600 \ufffd \uffff"}], SamplingParams(max_tokens=1))
    assert output.outputs[0].finish_reason in ("length", "stop")
