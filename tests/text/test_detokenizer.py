"""Incremental text: joined deltas equal the whole, nothing half-finished is shown, stop strings cut where they
should.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_engine.text import Detokenizer, Tokenizer, load_tokenizer

TINY = Path(__file__).parents[2] / "nemo_engine" / "assets" / "nemo-tiny"


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    tokenizer = load_tokenizer(TINY)
    assert tokenizer is not None
    return tokenizer


def stream(detokenizer: Detokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    """Deltas of feeding ``ids`` in groups of ``sizes`` (repeated), then of the end."""
    deltas, place, turn = [], 0, 0
    while place < len(ids):
        size = sizes[turn % len(sizes)]
        detokenizer.append(ids[place : place + size])
        deltas.append(detokenizer.take_delta())
        place, turn = place + size, turn + 1
    detokenizer.finish()
    return [*deltas, detokenizer.take_delta()]


any_ids = st.lists(st.one_of(st.integers(0, 6143), st.integers(1000, 1255), st.integers(0, 12)), max_size=40)
sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=300, deadline=None)
@given(ids=any_ids, sizes=sizes, skips=st.booleans(), stop=st.lists(st.text(min_size=1, max_size=4), max_size=2))
def test_joined_deltas_equal_the_whole_text(
    tiny: Tokenizer, ids: list[int], sizes: list[int], skips: bool, stop: list[str]
) -> None:
    whole = tiny.decode(ids, skip_special_tokens=skips)
    if any(text in whole for text in stop):
        stop = []
    detokenizer = Detokenizer(tiny, stop=stop, skip_special_tokens=skips)
    assert "".join(stream(detokenizer, ids, sizes)) == whole == detokenizer.text
    assert detokenizer.num_tokens == len(ids)


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=30))
def test_nothing_half_finished_is_shown(tiny: Tokenizer, text: str) -> None:
    text = text.replace("\ufffd", "")
    ids = tiny.encode(text, bos=False)
    seen = ""
    for delta in stream(Detokenizer(tiny), ids, [1]):
        assert "\ufffd" not in delta
        seen += delta
        assert text.startswith(seen)
    assert seen == text


@settings(max_examples=300, deadline=None)
@given(text=st.text("ab\n🎉é", min_size=1, max_size=25), stops=st.lists(st.text("ab\n🎉é", min_size=1, max_size=3), min_size=1, max_size=3),
       keeps=st.booleans(), sizes=sizes)  # fmt: skip
def test_stop_strings_cut_at_the_first_end(
    tiny: Tokenizer, text: str, stops: list[str], keeps: bool, sizes: list[int]
) -> None:
    ids = tiny.encode(text, bos=False)
    detokenizer = Detokenizer(tiny, stop=stops, include_stop_str_in_output=keeps)
    matched, place, turn = None, 0, 0
    while place < len(ids) and matched is None:
        size = sizes[turn % len(sizes)]
        matched = detokenizer.append(ids[place : place + size])
        place, turn = place + size, turn + 1
    detokenizer.finish()
    # The whole text is known here, so the rule is plain: the match that ends first, of the first token that completes
    # one.
    consumed, expected, expected_stop = 0, text, None
    for consumed in range(1, len(ids) + 1):
        shown = tiny.decode(ids[:consumed]).rstrip("\ufffd")
        ends = [(shown.index(stop) + len(stop), i, stop) for i, stop in enumerate(stops) if stop in shown]
        if ends:
            end, _, expected_stop = min(ends)
            expected = shown[: end if keeps else end - len(expected_stop)]
            break
    assert matched == expected_stop
    assert detokenizer.text == detokenizer.take_delta() == expected
    if matched is not None:
        assert detokenizer.num_tokens == consumed
        detokenizer.append(tiny.encode("more", bos=False))
        assert detokenizer.text == expected


def test_held_back_until_the_end(tiny: Tokenizer) -> None:
    detokenizer = Detokenizer(tiny, stop=["12345"])
    detokenizer.append(tiny.encode("abcdef", bos=False))
    assert detokenizer.text == "ab"
    detokenizer.finish()
    assert detokenizer.text == "abcdef" and detokenizer.take_delta() == "abcdef" and detokenizer.take_delta() == ""


def test_stop_strings_are_not_looked_for_before_min_tokens(tiny: Tokenizer) -> None:
    (a,) = tiny.encode("a", bos=False)
    detokenizer = Detokenizer(tiny, stop=["a"], min_tokens=3)
    assert [detokenizer.append([a]) for _ in range(4)] == [None, None, None, "a"]
    assert detokenizer.text == "aaa"


@pytest.mark.parametrize(("keeps", "expected"), [(False, "ab"), (True, "abc")])
def test_the_text_of_a_stop_token(tiny: Tokenizer, keeps: bool, expected: str) -> None:
    for stop in ((), ("zzz",)):
        detokenizer = Detokenizer(tiny, stop=stop, include_stop_str_in_output=keeps)
        detokenizer.append([*tiny.encode("ab", bos=False), *tiny.encode("c", bos=False)], last_is_stop_token=True)
        detokenizer.finish()
        assert detokenizer.text == expected


def test_cost_per_token_does_not_grow(tiny: Tokenizer) -> None:
    """Bytes copied per token must not depend on how much text there is: deltas are handed over, not rebuilt."""
    detokenizer = Detokenizer(tiny)
    ids = tiny.encode("x = 1\n", bos=False)
    for _ in range(20000):
        detokenizer.append(ids)
        assert detokenizer.take_delta() == "x = 1\n"
    assert detokenizer.text == "x = 1\n" * 20000


CALLS = 9  # [TOOL_CALLS]


def expected_mark(tiny: Tokenizer, ids: list[int], skips: bool) -> int | None:
    """Characters in front of the first mark, by decoding the whole: of the bytes before it, and none of those after."""
    if CALLS not in ids:
        return None
    return len(tiny.decode(ids[: ids.index(CALLS)], skip_special_tokens=skips))


@settings(max_examples=300, deadline=None)
@given(
    ids=any_ids,
    place=st.integers(0, 40),
    sizes=sizes,
    skips=st.booleans(),
    stop=st.lists(st.text(min_size=1, max_size=4), max_size=2),
)
def test_the_mark_stands_where_the_token_was(
    tiny: Tokenizer, ids: list[int], place: int, sizes: list[int], skips: bool, stop: list[str]
) -> None:
    ids.insert(place, CALLS)
    whole = tiny.decode(ids, skip_special_tokens=skips)
    if any(text in whole for text in stop):
        stop = []
    detokenizer = Detokenizer(tiny, stop=stop, skip_special_tokens=skips, mark_token_id=CALLS)
    mark = expected_mark(tiny, ids, skips)
    text, at, turn = "", 0, 0
    while at < len(ids):
        size = sizes[turn % len(sizes)]
        detokenizer.append(ids[at : at + size])
        text += detokenizer.take_delta()
        at, turn = at + size, turn + 1
        assert detokenizer.mark in (None, mark)
        assert mark is not None and (detokenizer.mark is not None or len(text) <= mark)  # never later than its text
    detokenizer.finish()
    assert detokenizer.text == whole and detokenizer.mark == mark
    if not skips:
        assert whole[mark:].startswith("[TOOL_CALLS]")


@pytest.mark.parametrize(
    ("before", "after", "stop", "keeps", "text", "mark"),
    [
        ("ab", "[1]", (), False, "ab[1]", 2),
        ("", "[1]", (), False, "[1]", 0),
        ("ab", "[1]x", ("x",), False, "ab[1]", 2),
        ("ab", "x", ("x",), False, "ab", 2),
        ("ab", "xy", ("bx",), False, "a", None),  # the text ends in front of it
        ("ab", "xy", ("bx",), True, "abx", 2),
        ("abx", "", ("b",), False, "a", None),
    ],
)
def test_marks_and_stop_strings(
    tiny: Tokenizer, before: str, after: str, stop: tuple[str, ...], keeps: bool, text: str, mark: int | None
) -> None:
    detokenizer = Detokenizer(tiny, stop=stop, include_stop_str_in_output=keeps, mark_token_id=CALLS)
    for token_id in [*tiny.encode(before, bos=False), CALLS, *tiny.encode(after, bos=False), CALLS]:
        detokenizer.append([token_id])
        assert detokenizer.mark in (None, mark)
    detokenizer.finish()
    assert (detokenizer.text, detokenizer.mark) == (text, mark)


@pytest.mark.parametrize("skips", [False, True])
def test_the_mark_after_half_a_character(tiny: Tokenizer, skips: bool) -> None:
    """A cut character becomes one U+FFFD in front of the mark, even if the rest of it should follow."""
    ids = {byte: next(i for i in range(1000, 1256) if tiny.token_bytes(i) == bytes([byte])) for byte in "€".encode()}
    first, second, third = ids.values()
    for cut, rest in (([first], [1091]), ([first, second], [1091]), ([first], [second, third])):
        detokenizer = Detokenizer(tiny, skip_special_tokens=skips, mark_token_id=CALLS)
        detokenizer.append([1097, *cut, CALLS, *rest])
        detokenizer.finish()
        assert detokenizer.mark == 2 and detokenizer.text == tiny.decode(
            [1097, *cut, CALLS, *rest], skip_special_tokens=skips
        )


def test_a_stop_token_leaves_no_mark(tiny: Tokenizer) -> None:
    for keeps in (False, True):
        detokenizer = Detokenizer(tiny, include_stop_str_in_output=keeps, mark_token_id=CALLS)
        detokenizer.append([1097, CALLS], last_is_stop_token=True)
        detokenizer.finish()
        assert detokenizer.mark == (1 if keeps else None)
