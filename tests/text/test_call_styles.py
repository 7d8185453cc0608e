"""Tool calls between tags: however an answer is cut, the same calls come of it; and the grammar of forced ones."""

from __future__ import annotations

import json
import random

import pytest

from nemo_engine.text.call_styles import CallForm, TaggedReader
from nemo_engine.text.tool_calls import Event, ToolCall, merge_events

FORM = CallForm("<tool_call>\n", "\n</tool_call>", "\n")
CALL = '<tool_call>\n{"name": "f", "arguments": {"x": "</tool_call>"}}\n</tool_call>'
ANSWERS: dict[str, tuple[str, list[tuple[str, str]], bool, bool]] = {
    "hello": ("hello", [], False, False),
    f"a \n{CALL}\n<tool_call>{{\"arguments\": {{}}, \"name\": \"g\"}}</tool_call>\n": (
        "a", [("f", '{"x": "</tool_call>"}'), ("g", "{}")], False, False,
    ),
    f"{CALL} and text": (" and text", [("f", '{"x": "</tool_call>"}')], False, False),
    "x<tool_call>nope</tool_call> y": ("x<tool_call>nope</tool_call> y", [], True, False),
    '<tool_call>{"name": "f", "arguments": {"a": 1': ("", [("f", '{"a": 1')], False, True),
    '<tool_call>{"name": "f", "arguments": {}} so </tool_call>': ("so </tool_call>", [("f", "{}")], True, False),
    "<tool_ca": ("<tool_ca", [], False, False),
    "a \n\n": ("a \n\n", [], False, False),
    "<tool_call": ("<tool_call", [], False, False),
    '<tool_call>{"name": "f"}</tool_': ("", [("f", "{}")], False, False),
    '<tool_call>[{"name": "f"}, {"name": "g"}]</tool_call>': ("", [("f", "{}"), ("g", "{}")], False, False),
    '<tool_call> <tool_call>{"name": "f"}</tool_call>': ("<tool_call>", [("f", "{}")], True, False),
    "<tool_call>": ("<tool_call>", [], False, True),
}  # fmt: skip


def read(text: str, rng: random.Random | None, **options: bool) -> tuple[TaggedReader, str, list[ToolCall]]:
    reader = TaggedReader(FORM, seed="s", **options)
    events: list[Event] = []
    while text:
        size = len(text) if rng is None else rng.randint(1, 5)
        events += reader.feed(text[:size])
        text = text[size:]
    events += reader.finish()
    content, calls = merge_events(events)
    assert [one.index for one in events if type(one).__name__ == "CallStarted"] == list(range(len(calls)))
    assert reader.num_calls == len(calls) == len({call.id for call in calls})
    return reader, content, calls


@pytest.mark.parametrize("text", ANSWERS)
def test_calls_are_read_however_the_answer_is_cut(text: str) -> None:
    content, calls, is_malformed, is_cut = ANSWERS[text]
    for seed in (None, *range(30)):
        reader, found, made = read(text, None if seed is None else random.Random(seed))
        assert (found, [(call.name, call.arguments) for call in made]) == (content, calls)
        assert (reader.is_malformed, reader.is_cut) == (is_malformed, is_cut)


def test_a_forced_answer_begins_within_a_call() -> None:
    for seed in range(30):
        reader, content, calls = read(CALL[len(FORM.open) :] + "\n" + CALL, random.Random(seed), is_forced=True)
        assert not content and [call.name for call in calls] == ["f", "f"] and not reader.is_malformed
    reader, content, calls = read("no call", random.Random(0), is_forced=True)
    assert content == "no call" and not calls and reader.is_malformed


def test_anything_is_content_or_calls() -> None:
    pieces = [
        "<tool_call>",
        "</tool_call>",
        '{"name": "f"',
        ', "arguments": {}}',
        "}",
        "{",
        "\n",
        " ",
        "x",
        "<",
        '"',
        "\\",
        "[",
        "]",
        ",",
    ]
    for seed in range(300):
        rng = random.Random(seed)
        text = "".join(rng.choices(pieces, k=rng.randrange(12)))
        _, content, calls = read(text, None)
        for again in range(3):
            _, other, more = read(text, random.Random(again))
            assert (other, more) == (content, calls), text
        for call in calls:
            assert call.name == "f"
            if json.dumps(call.arguments) and call.arguments == "{}":
                assert json.loads(call.arguments) == {}
