"""NeMo's tool calls out of text: any split gives the same events, json.loads agrees, and nothing ever raises."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_engine.text import tool_calls
from nemo_engine.text.json_scanner import MAX_DEPTH, JsonScanner
from nemo_engine.text.tool_calls import (
    AnswerParser,
    ArgumentsDelta,
    CallFinished,
    CallStarted,
    Content,
    Event,
    ToolCallParser,
    merge_events,
    new_tool_call_id,
    parse_answer,
    parse_tool_calls,
)
from tests.helpers.patience import check_growth

ID = st.from_regex(r"[a-zA-Z0-9]{9}", fullmatch=True)
NAME = st.from_regex(r"[a-zA-Z0-9_-]{1,64}", fullmatch=True)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
ARGUMENTS = st.dictionaries(st.text(max_size=5), VALUE, max_size=4)
SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=4)


@st.composite
def calls_and_text(draw: st.DrawFn) -> tuple[list[tuple[str, dict[str, Any]]], str]:
    """Calls, and one of the ways to write them."""
    calls, written = [], []
    is_ascii, space = draw(st.booleans()), draw(st.sampled_from(["", " ", "\n\t"]))
    separators = (f"{space},{space}", f"{space}:{space}")
    for _ in range(draw(st.integers(1, 3))):
        name, arguments = draw(NAME), draw(ARGUMENTS)
        form = draw(st.sampled_from(["object", "text"] + ([] if arguments else ["null", "missing"])))
        text = json.dumps(arguments, ensure_ascii=is_ascii, separators=separators)
        pairs = [("name", json.dumps(name)), ("arguments", text if form == "object" else json.dumps(text))]
        if form == "null":
            pairs[1] = ("arguments", "null")
        if form == "missing":
            del pairs[1]
        if draw(st.booleans()):
            pairs.append(("id", json.dumps(draw(ID))))
        if draw(st.booleans()):
            pairs.append(("type", '"function"'))
        own = separators[0].join(f'"{key}"{separators[1]}{value}' for key, value in draw(st.permutations(pairs)))
        written.append(f"{space}{{{space}{own}{space}}}{space}")
        calls.append((name, arguments))
    if len(calls) == 1 and draw(st.booleans()):
        return calls, written[0]
    return calls, f"{space}[{','.join(written)}]"


def pieces(text: str, sizes: Sequence[int]) -> list[str]:
    cut, place, turn = [], 0, 0
    while place < len(text):
        size = sizes[turn % len(sizes)]
        cut.append(text[place : place + size])
        place, turn = place + size, turn + 1
    return cut


def events_of(parts: Sequence[str]) -> tuple[list[Event], ToolCallParser]:
    parser = ToolCallParser(seed=0)
    events: list[Event] = []
    for part in parts:
        events += parser.feed(part)
    return events + parser.finish(), parser


def joined(events: Sequence[Event]) -> list[Event]:
    """Neighbouring pieces of the same thing made one."""
    whole: list[Event] = []
    for event in events:
        last = whole[-1] if whole else None
        if isinstance(event, Content) and isinstance(last, Content):
            whole[-1] = Content(last.text + event.text)
        elif isinstance(event, ArgumentsDelta) and isinstance(last, ArgumentsDelta) and event.index == last.index:
            whole[-1] = ArgumentsDelta(event.index, last.text + event.text)
        else:
            whole.append(event)
    return whole


@settings(max_examples=300, deadline=None)
@given(written=calls_and_text(), sizes=SIZES, tail=st.sampled_from(["", "  \n", " and so on", "[x"]))
def test_any_split_gives_the_calls(
    written: tuple[list[tuple[str, dict[str, Any]]], str], sizes: list[int], tail: str
) -> None:
    calls, text = written
    events, parser = events_of(pieces(text + tail, sizes))
    assert joined(events) == joined(events_of([text + tail])[0])
    assert not parser.is_malformed and not parser.is_cut and parser.num_calls == len(calls)
    content, found = merge_events(events)
    assert content == tail.lstrip() and [(call.name, json.loads(call.arguments)) for call in found] == calls
    for call, (_, arguments) in zip(found, calls, strict=True):
        assert call.arguments[0] == "{" and call.arguments[-1] == "}" and json.loads(call.arguments) == arguments
        assert len(call.id) == 9 and call.id.isascii() and call.id.isalnum()
    assert parse_tool_calls(text + tail, seed=0) == (content, found)


@settings(max_examples=300, deadline=None)
@given(written=calls_and_text(), cut=st.integers(0, 400), junk=st.text('{}[]",:\\abn01 \n', max_size=3), sizes=SIZES)
def test_broken_lists_are_the_same_for_any_split(
    written: tuple[list[tuple[str, dict[str, Any]]], str], cut: int, junk: str, sizes: list[int]
) -> None:
    text = written[1][:cut] + junk + written[1][cut + len(junk) :]
    check_consistent(text, sizes)
    check_consistent(text[:cut], sizes)


@settings(max_examples=500, deadline=None)
@given(text=st.text() | st.text('{}[]",:\\u0123nameargumentsid \n'), sizes=SIZES)
def test_arbitrary_text_never_raises(text: str, sizes: list[int]) -> None:
    check_consistent(text, sizes)


def check_consistent(text: str, sizes: list[int]) -> None:
    events, parser = events_of(pieces(text, sizes))
    whole, other = events_of([text])
    assert joined(events) == joined(whole) and parser.is_malformed == other.is_malformed
    content, calls = parse_tool_calls(text, seed=0)
    if parser.is_malformed or parser.is_cut:
        assert (content, calls) == (text, [])
    if not any(isinstance(event, CallStarted) for event in events):
        assert "".join(event.text for event in events if isinstance(event, Content)) == text
    open_calls: set[int] = set()
    for event in events:  # well-formed for a client
        if isinstance(event, CallStarted):
            assert not open_calls
            open_calls.add(event.index)
        elif isinstance(event, ArgumentsDelta):
            assert event.index in open_calls
        elif isinstance(event, CallFinished):
            open_calls.remove(event.index)
            if event.is_complete:
                assert isinstance(json.loads(merge_events(events)[1][event.index].arguments), dict)
        else:
            assert not open_calls
    assert not open_calls


@settings(max_examples=300, deadline=None)
@given(value=VALUE, junk=st.text('{}[]",:\\-+.eE01234567890tfnau \n', max_size=4), at=st.integers(0, 60), sizes=SIZES)
def test_the_scanner_agrees_with_json(value: Any, junk: str, at: int, sizes: list[int]) -> None:
    text = json.dumps(value)
    text = (text[:at] + junk + text[at + len(junk) // 2 :]).strip()
    scanner, passed = JsonScanner(), ""
    for part in pieces(text + " ", sizes):
        if not scanner.is_done and not scanner.is_broken:
            end, more = scanner.feed(part)
            passed += more
            if scanner.is_done and part[end:].strip():
                return  # more than one value
    try:
        expected = json.loads(text, strict=False, parse_constant=lambda name: pytest.fail(name))
    except json.JSONDecodeError:
        assert not scanner.is_done or passed != text
    else:
        assert scanner.is_done and json.loads(passed) == expected


def test_events_as_they_come() -> None:
    parser = ToolCallParser(seed=1)
    seen = [
        (part, parser.feed(part)) for part in ('[{"na', 'me": "get', '_x"', ', "arguments": {"a', '": 1', "2}}", "]")
    ]
    assert seen == [
        ('[{"na', []),
        ('me": "get', []),
        ('_x"', [CallStarted(0, new_tool_call_id(1, 0), "get_x")]),
        (', "arguments": {"a', [ArgumentsDelta(0, '{"a')]),
        ('": 1', [ArgumentsDelta(0, '": ')]),
        ("2}}", [ArgumentsDelta(0, "12}"), CallFinished(0, True)]),
        ("]", []),
    ]
    assert parser.finish() == []


def test_arguments_are_held_back_until_the_name_is_known() -> None:
    parser = ToolCallParser()
    assert parser.feed('[{"arguments": {"x": [1, 2]}, "name": ') == []
    (started, delta) = parser.feed('"f"')
    assert isinstance(started, CallStarted) and delta == ArgumentsDelta(0, '{"x": [1, 2]}')


def test_surrogate_escapes_in_arguments_that_are_text() -> None:
    for inner in ({"x": '🎉é\\"\n'}, {"🎉": []}):
        text = json.dumps([{"name": "f", "arguments": json.dumps(inner)}])
        (call,) = merge_events(events_of(list(text))[0])[1]
        assert json.loads(call.arguments) == inner
    _, (call,) = parse_tool_calls(r'[{"name": "f", "arguments": "{\"x\": \"\ud83d\"}"}]')
    assert json.loads(call.arguments) == {"x": "\ufffd"}


def test_raw_control_characters_become_escapes() -> None:
    _, (call,) = parse_tool_calls('[{"name": "f", "arguments": {"code": "a\n\tb"}}]')
    assert json.loads(call.arguments) == {"code": "a\n\tb"}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  ",
        "I cannot do that.",
        "[]",
        "{}",
        "[{}]",
        "[1]",
        "null",
        "[{'name': 'f', 'arguments': {}}]",
        '[{"name": "f", "arguments": [1]}]',
        '[{"name": "f", "arguments": 3}]',
        '[{"name": "f", "arguments": "no object"}]',
        '[{"name": "f", "arguments": "[]"}]',
        '[{"name": "f", "arguments": {"x": NaN}}]',
        '[{"name": "f", "arguments": {"x": 01}}]',
        '[{"name": "f", "arguments": {"x": "\\q"}}]',
        '[{"name": "f", "arguments": {"x": 1,}}]',
        '[{"name": "f", "arguments": {}} {"name": "g", "arguments": {}}]',
        '[{"name": "f", "arguments": {}},]',
        '[{"name": "f", "arguments": {}, "name": "g"}]',
        '[{"name": "f", "parameters": {"x": 1}}]',
        '[{"name": "no name", "arguments": {}}]',
        '[{"name": "", "arguments": {}}]',
        '[{"name": 5, "arguments": {}}]',
        '[{"arguments": {}}]',
        '[[{"name": "f", "arguments": {}}]]',
        '[{"name": "f", "arguments": {"x": 1',
        '[{"name": "f", "arguments": {}}, {"na',
    ],
)
def test_what_is_no_list_of_calls_is_content(text: str) -> None:
    assert parse_tool_calls(text) == (text, [])


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("no JSON", [Content("no JSON")]),
        ('[{"name": "f", "arguments": {"x": tru3}} more', ["start", ArgumentsDelta(0, '{"x": '), CallFinished(0, False), Content("tru3}} more")]),
        ('[{"name": "f", "arguments": {}} more', ["start", ArgumentsDelta(0, "{}"), CallFinished(0, True), Content(" more")]),
        ('[{"name": "f", "argh": 1}]', ["start", CallFinished(0, False), Content('"argh": 1}]')]),
        ('[{"name": "f", "arguments": {}}, {"name": "g h"}]', ["start", ArgumentsDelta(0, "{}"), CallFinished(0, True), Content(', {"name": "g h"}]')]),
    ],
)  # fmt: skip
def test_a_stream_that_breaks_stays_consistent(text: str, events: list[Any]) -> None:
    found = joined(events_of(list(text))[0])
    assert [("start" if isinstance(event, CallStarted) else event) for event in found] == events


@pytest.mark.parametrize(
    ("text", "content", "arguments"),
    [
        ('[{"name": "f", "arguments": {"x": 12', "", ['{"x": 12']),
        ('[{"name": "f", "arguments": {"x": "a', "", ['{"x": "a']),
        ('[{"name": "f"', "", [""]),
        ('[{"name": "f", "arguments": {}}', "", ["{}"]),
        ('[{"name": "f", "arguments": {}', "", ["{}"]),
        ('[{"name": "f", "arguments": {}}, {"name": "g', ', {"name": "g', ["{}"]),
        ('[{"name": "f', '[{"name": "f', []),
    ],
)
def test_truncated_by_the_token_limit(text: str, content: str, arguments: list[str]) -> None:
    found, calls = parse_tool_calls(text, is_truncated=True)
    assert found == content and [call.arguments for call in calls] == arguments


def test_a_missing_bracket_at_the_end_is_tolerated() -> None:
    content, (call,) = parse_tool_calls('[{"name": "f", "arguments": {"x": 1}}')
    assert content == "" and call.arguments == '{"x": 1}'


@pytest.mark.parametrize("deep", ['{"x":' * 5000, '{"x":[' + "[" * 5000])
def test_hostile_nesting_is_bounded(deep: str) -> None:
    text = '[{"name": "f", "arguments": ' + deep
    events, parser = events_of(pieces(text, [777]))
    assert parser.is_malformed and parse_tool_calls(text) == (text, [])
    fits = '{"x":' * MAX_DEPTH + "1" + "}" * MAX_DEPTH
    _, (call,) = parse_tool_calls(f'[{{"name": "f", "arguments": {fits}}}]')
    assert call.arguments == fits


def test_memory_is_bounded_and_time_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tool_calls, "MAX_HELD", 1000)
    for endless in (
        '[{"arguments": {"x": "',
        '[{"name": "',
        " ",
        '[{"name": "f", "arguments": "',
        '[{"name": "f", "id": "',
    ):
        parser = ToolCallParser()
        for _ in range(50):
            parser.feed(endless if endless == " " else "")
        parser.feed(endless)
        for _ in range(200):
            parser.feed("a" * 10 if endless != " " else " " * 10)
        assert parser.is_malformed
        assert len("".join(parser._held)) + len("".join(parser._token)) == 0


def test_the_time_goes_with_the_length_of_an_argument() -> None:
    def seconds(share: float) -> float:
        parser = ToolCallParser()
        parser.feed('[{"name": "f", "arguments": {"x": "')
        begin = time.thread_time()
        for _ in range(int(50_000 * share)):
            parser.feed("a\\nb")
        assert not parser.is_malformed
        return time.thread_time() - begin

    check_growth(seconds)


def test_ids() -> None:
    assert new_tool_call_id("a", 0) == new_tool_call_id("a", 0) != new_tool_call_id("a", 1)
    assert len({new_tool_call_id() for _ in range(100)}) == 100
    assert all(len(i) == 9 and i.isascii() and i.isalnum() for i in (new_tool_call_id(), new_tool_call_id(5)))


@settings(max_examples=200, deadline=None)
@given(written=calls_and_text(), before=st.text(max_size=10), shows=st.booleans(), sizes=SIZES)
def test_answers_with_content_in_front(
    written: tuple[list[tuple[str, dict[str, Any]]], str], before: str, shows: bool, sizes: list[int]
) -> None:
    text = before + ("[TOOL_CALLS]" if shows else "") + written[1]
    parser, events, num_seen = AnswerParser(seed=3, shows_special=shows), [], 0
    for part in pieces(text, sizes):
        num_seen += len(part)
        events += parser.feed(part, len(before) if num_seen >= len(before) else None)
    content, calls = merge_events(events + parser.finish())
    assert content == before and [(call.name, json.loads(call.arguments)) for call in calls] == written[0]
    assert parse_answer(text, len(before), seed=3, shows_special=shows) == (content, calls)
    assert parse_answer(text, None) == (text, [])


def test_an_answer_that_begins_within_the_calls() -> None:
    parser = AnswerParser(starts_with_calls=True, shows_special=True)
    content, (call,) = merge_events(parser.feed('[{"name": "f", "arguments": {}}]') + parser.finish())
    assert content == "" and call.name == "f"
    assert parse_answer("no calls", 3) == ("no calls", [])
