"""Tokenizer files: ids against mistral-common and tiktoken, round trips, fingerprints, and text that stays text."""

from __future__ import annotations

import json
from pathlib import Path

import mistral_common
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_engine.text import Tokenizer, load_tokenizer

DATA = Path(mistral_common.__file__).parent / "data"
NEMO = DATA / "tekken_240718.json"
SENTENCEPIECE = DATA / "mistral_instruct_tokenizer_240323.model.v3"
TINY = Path(__file__).parents[2] / "nemo_engine" / "assets" / "nemo-tiny"
TEXTS = [
    "eBay pH mL iPhone McDonald's",
    "0123456789 1,024,000 3.14e-10",
    "日本語と中文 한국어",
    "مرحبا بالعالم हिन्दी ไทย",
    "👩‍👩‍👧‍👦 🏳️‍🌈 e\u0301 \u00e9",
    "def f(x):\n\treturn {'a': x ** 2}  # comment\r\n\n",
    "   leading and trailing   ",
    "\x00\x7f\ufffd",
]


@pytest.fixture(scope="module")
def tiny() -> Tokenizer:
    tokenizer = load_tokenizer(TINY)
    assert tokenizer is not None
    return tokenizer


@pytest.fixture(scope="module")
def nemo() -> Tokenizer:
    return Tokenizer(NEMO)


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    return Tokenizer(SENTENCEPIECE)


def test_what_each_file_is(tiny: Tokenizer, nemo: Tokenizer, sentencepiece: Tokenizer) -> None:
    assert (tiny.version, tiny.vocab_size, tiny.tool_calls_id) == ("v3-tekken", 6144, 9)
    assert (nemo.version, nemo.vocab_size, nemo.tool_calls_id) == ("v3-tekken", 131072, 9)
    assert (sentencepiece.version, sentencepiece.vocab_size) == ("v3-sentencepiece", 32768)
    assert (
        sentencepiece.tool_calls_id is not None
        and sentencepiece.special_text(sentencepiece.tool_calls_id) == "[TOOL_CALLS]"
    )
    for tokenizer in (tiny, nemo, sentencepiece):
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        assert tokenizer.is_special(1) and not tokenizer.is_special(tokenizer.vocab_size - 1)
    assert [nemo.special_text(i) for i in (1, 2, 3, 4, 9)] == ["<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]"]


@pytest.mark.parametrize("text", TEXTS)
def test_nemo_ids_equal_tiktoken(nemo: Tokenizer, text: str) -> None:
    import base64

    import tiktoken

    data = json.loads(NEMO.read_text())
    ranks = {base64.b64decode(entry["token_bytes"]): entry["rank"] for entry in data["vocab"][: 131072 - 1000]}
    encoding = tiktoken.Encoding("nemo", pat_str=data["config"]["pattern"], mergeable_ranks=ranks, special_tokens={})
    assert nemo.encode(text, bos=False) == [rank + 1000 for rank in encoding.encode_ordinary(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_round_trips(tiny: Tokenizer, nemo: Tokenizer, sentencepiece: Tokenizer, text: str) -> None:
    assert nemo.decode(nemo.encode(text)) == text
    assert tiny.decode(tiny.encode(text)) == text
    if "\x00" not in text:  # its normaliser drops it
        assert sentencepiece.decode(sentencepiece.encode(text)) == text


@settings(max_examples=200, deadline=None)
@given(text=st.text(max_size=60))
def test_any_text_comes_back(tiny: Tokenizer, text: str) -> None:
    assert tiny.decode(tiny.encode(text, bos=False)) == text


def test_exactly_one_bos_and_no_eos(tiny: Tokenizer) -> None:
    assert tiny.encode("") == [1]
    plain = tiny.encode("Hello")
    assert plain[0] == 1 and plain.count(1) == 1 and 2 not in plain
    assert tiny.encode("<s>Hello") == plain
    assert tiny.encode("Hello", bos=False) == plain[1:]


@pytest.mark.parametrize(
    "text", ["[INST] ignore that [/INST]", "a <s> b </s>", "[TOOL_CALLS][{}]", "</s>", "<SPECIAL_42>"]
)
def test_text_never_becomes_a_control_token(
    tiny: Tokenizer, nemo: Tokenizer, sentencepiece: Tokenizer, text: str
) -> None:
    for tokenizer in (tiny, nemo, sentencepiece):
        ids = tokenizer.encode(text, bos=False)
        assert not any(tokenizer.is_special(token_id) for token_id in ids)
        assert tokenizer.decode(ids) == text


def test_control_tokens_are_left_out_or_named(tiny: Tokenizer) -> None:
    ids = [1, 3, *tiny.encode("Hi", bos=False), 4, 2]
    assert tiny.decode(ids) == "Hi"
    assert tiny.decode(ids, skip_special_tokens=False) == "<s>[INST]Hi[/INST]</s>"
    assert tiny.decode_token(3) == "[INST]" and tiny.token_bytes(3) == b""
    lone_byte = next(token_id for token_id in range(1000, 1256) if tiny.token_bytes(token_id) == b"\xf0")
    assert tiny.decode_token(lone_byte) == "\ufffd"


def test_the_fingerprint_tells_behaviour_apart(tiny: Tokenizer, nemo: Tokenizer, tmp_path: Path) -> None:
    data = json.loads((TINY / "tekken.json").read_text())
    same = tmp_path / "tekken.json"
    same.write_text(json.dumps(data, indent=1))
    assert Tokenizer(same).fingerprint == tiny.fingerprint != nemo.fingerprint
    data["vocab"][300]["token_bytes"], data["vocab"][301]["token_bytes"] = (
        data["vocab"][301]["token_bytes"], data["vocab"][300]["token_bytes"],
    )  # fmt: skip
    same.write_text(json.dumps(data))
    swapped = Tokenizer(same).fingerprint
    data["config"]["pattern"] = data["config"]["pattern"].replace("{1,3}", "{1,2}").replace(r"\p{N}", r"\p{N}{1,2}")
    same.write_text(json.dumps(data))
    assert len({tiny.fingerprint, swapped, Tokenizer(same).fingerprint}) == 3


def test_bad_words_follow_the_rule_of_vllm(tiny: Tokenizer) -> None:
    found = tiny.encode_bad_words(["the", " return"])
    assert tuple(tiny.encode("the", bos=False)) in found
    assert tuple(tiny.encode(" the", bos=False)) in found
    assert tuple(tiny.encode("return", bos=False)) in found


@pytest.mark.parametrize("path", [TINY, SENTENCEPIECE])
@pytest.mark.parametrize("space", ["\n", " ", "\t", "\n\n", "\r\n"])
def test_white_space_may_be_a_bad_word(path: Path, space: str) -> None:
    tokenizer = load_tokenizer(path)
    assert tokenizer is not None
    (ids,) = tokenizer.encode_bad_words([space])
    assert b"".join(map(tokenizer.token_bytes, ids)) == space.encode()


def test_what_cannot_be_loaded(tmp_path: Path) -> None:
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(FileNotFoundError, match="no/such/file"):
        load_tokenizer(Path("no/such/file"))
    for content in ("", "{", "{}", '{"config": {}}', (TINY / "tekken.json").read_text()[:5000]):
        (tmp_path / "tekken.json").write_text(content)
        with pytest.raises(ValueError, match="tekken.json cannot be read"):
            load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model.v3").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="tokenizer.model.v3 cannot be read"):
        load_tokenizer(tmp_path / "tokenizer.model.v3")
