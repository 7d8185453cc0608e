"""``tokenizer.json``: ids against Tekken's, the library's and transformers', text that stays text, the choice of a
file, broken files.
"""

from __future__ import annotations

import copy
import gettext
import json
import logging
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common
import pycountry
import pytest
import tokenizers

from nemo_engine.text import Detokenizer, Tokenizer, load_tokenizer, render_chat
from tests.helpers.hf_tokenizers import added, byte_fallback, config_of, cut_tekken, tekken_as_hf, write, written

ROOT = Path(__file__).parents[2]
TEKKEN = ROOT / "nemo_engine" / "assets" / "nemo-tiny" / "tekken.json"
NEMO = Path(mistral_common.__file__).parent / "data" / "tekken_240718.json"
SCRIPTS = (
    "ar",
    "bn",
    "el",
    "gu",
    "he",
    "hi",
    "hy",
    "ja",
    "ka",
    "kn",
    "ko",
    "pa",
    "ru",
    "ta",
    "te",
    "th",
    "vi",
    "zh_CN",
)
CHATML = ("<|im_start|>", "<|im_end|>")
Json = dict[str, Any]


def prose(language: str, length: int) -> str:
    """Names of languages and countries, translated."""
    texts = []
    for path in sorted(Path(pycountry.__file__).parent.glob(f"locales/{language}/LC_MESSAGES/*.mo")):
        with path.open("rb") as file:
            texts += [text for text in gettext.GNUTranslations(file)._catalog.values() if isinstance(text, str)]  # type: ignore[attr-defined]
    return ", ".join(texts)[:length]


def strange(seed: int, length: int) -> str:
    """Characters of all planes, marks, white space of all kinds, and runs of few letters, in which ties among merges
    would show.
    """
    draw = random.Random(seed)
    marks, spaces = "\u0301\u0489\u093f\u200d\ufe0f\u20e3", " \t\r\n\x00\x1c\x85\u00a0\u2028\u200b\ufeff\u3000"
    planes = ((32, 127), (0xA0, 0x2FF), (0x300, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x10FFFF))
    made: list[str] = []
    while len(made) < length:
        kind = draw.randrange(8)
        if kind < 4:
            made.append(chr(draw.randrange(*draw.choice(planes))))
        elif kind < 6:
            made.append(draw.choice(marks + spaces + "'stmA1²ǅʰ中.<>/"))
        else:
            made += draw.choice(("a", "ab", "aba", " ", "  a", "\n ", "=", "-=", "0", "é", "中", "ह")) * draw.randint(
                1, 9
            )
    return "".join(made)


@pytest.fixture(scope="module")
def tiny_json() -> Json:
    return tekken_as_hf(TEKKEN)


@pytest.fixture
def edited(tiny_json: Json, tmp_path: Path) -> Callable[..., Path]:
    """Writes ``tokenizer.json`` after an edit; returns its path."""

    def write_edited(edit: Callable[[Json], object] = lambda data: None, **config: Any) -> Path:
        data = copy.deepcopy(tiny_json)
        edit(data)
        return write(tmp_path, data, config_of(data, **config))

    return write_edited


@pytest.fixture(scope="module")
def tekken() -> Tokenizer:
    return Tokenizer(TEKKEN)


# ---- ids


def test_ids_of_nemo_equal_tekken(tmp_path: Path) -> None:
    cut = cut_tekken(NEMO, 32768, tmp_path / "tekken.json")
    theirs, ours = Tokenizer(cut), Tokenizer(write(tmp_path, tekken_as_hf(cut)))
    assert (ours.version, ours.vocab_size, ours.bos_id, ours.eos_id, ours.tool_calls_id) == (
        "byte-level-bpe",
        32768,
        1,
        2,
        9,
    )
    assert [*map(ours.token_bytes, range(32768))] == [*map(theirs.token_bytes, range(32768))]
    texts = [prose(language, 20_000) for language in SCRIPTS]
    assert all(len(text) > 2000 for text in texts)
    texts += [path.read_text() for path in sorted((ROOT / "nemo_engine" / "scheduler").glob("*.py"))]
    texts += [(ROOT / "ARCHITECTURE.md").read_text(), *(strange(seed, 5000) for seed in range(20))]
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(text)
        assert ours.decode(ids) == text


def test_conversations_equal_those_of_tekken(edited: Callable[..., Path], tekken: Tokenizer) -> None:
    tokenizer = Tokenizer(edited())
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}]
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "Be [INST] brief."},
        {"role": "user", "content": " what? </s>"},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1", "tool_call_id": "abcdefghi"},
        {"role": "assistant", "content": "One. "},
        {"role": "user", "content": "日本"},
    ]
    assert render_chat(tokenizer, messages, tools=tools) == render_chat(tekken, messages, tools=tools)


def without(*steps: int) -> Callable[[Json], object]:
    return lambda data: data["model"].update(merges=data["model"]["merges"][slice(*steps)])


def with_regex(regex: str) -> Callable[[Json], object]:
    def edit(data: Json) -> None:
        without(None, None, 2)(data)
        data["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": regex}

    return edit


def gpt2(data: Json) -> None:
    without(None, None, 2)(data)
    data["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


LLAMA_3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = ["\u2581the", "\u2581\u2581", "\u2581tokenizer", "ing", "\u2581of", "er", "\u2581日", "日本"]
KINDS: dict[str, Callable[[Json], Json]] = {
    "ranked": lambda tiny: tiny,
    "unranked": lambda tiny: edit_of(tiny, lambda data: data["model"].update(ignore_merges=False)),
    "half of the merges": lambda tiny: edit_of(tiny, without(None, None, 2)),
    "merges in pairs": lambda tiny: edit_of(
        tiny, lambda data: data["model"].update(merges=[merge.split(" ") for merge in data["model"]["merges"][::3]])
    ),
    "gpt2": lambda tiny: edit_of(tiny, gpt2),
    "llama 3": lambda tiny: edit_of(tiny, with_regex(LLAMA_3)),
    "across words": lambda tiny: edit_of(tiny, with_regex(r"\n|[^\n]+")),
    "legacy": lambda tiny: byte_fallback(WORDS, legacy=True),
    "joined words": lambda tiny: byte_fallback([*WORDS, "\u2581of\u2581the", "e\u2581"]),
} | {
    f"{scheme}, {'split' if split else 'whole'}": lambda tiny, scheme=scheme, split=split: edit_of(
        byte_fallback(WORDS), lambda data: data["pre_tokenizer"].update(prepend_scheme=scheme, split=split)
    )
    for scheme in ("first", "always", "never")
    for split in (True, False)
}


def edit_of(data: Json, edit: Callable[[Json], object]) -> Json:
    data = copy.deepcopy(data)
    edit(data)
    return data


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_those_of_the_library(kind: str, tiny_json: Json, tmp_path: Path) -> None:
    data = KINDS[kind](tiny_json)
    tokenizer = Tokenizer(write(tmp_path, data))
    library = tokenizers.Tokenizer.from_str(json.dumps(data | {"added_tokens": [], "post_processor": None}))
    text = (ROOT / "README.md").read_text()
    draw = random.Random(1)
    texts = [text, "", " ", "  a", "\u2581x", *(strange(seed, 300).replace("的", " of the ") for seed in range(40))]
    texts += [text[start : start + draw.randrange(300)] for start in (draw.randrange(len(text)) for _ in range(60))]
    for one in texts:
        ids = tokenizer.encode(one, bos=False)
        assert ids == library.encode(one, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == library.decode(ids)
        streamed = Detokenizer(tokenizer)
        for token_id in ids:
            streamed.append([token_id])
        streamed.finish()
        assert streamed.text == tokenizer.decode(ids)


def test_a_part_of_a_prompt_gets_the_space_that_the_library_gives_it(tmp_path: Path) -> None:
    for legacy in (False, True):
        data = byte_fallback(WORDS, legacy=legacy)
        tokenizer = Tokenizer(write(tmp_path, data))
        library = tokenizers.Tokenizer.from_str(json.dumps(data))
        for text in ("the", " the", "x the"):
            wanted = library.encode(f"the</s>{text}", add_special_tokens=False).ids
            parts = [*tokenizer.encode_span("the", is_start=True), 2, *tokenizer.encode_span(text)]
            assert parts == wanted


def test_a_long_text_is_refused_before_it_is_encoded(edited: Callable[..., Path]) -> None:
    text = "word and number 12 " * 20_000
    for edit in (lambda data: None, without(None, None, 2)):
        tokenizer = Tokenizer(edited(edit))
        count = len(tokenizer.encode(text, bos=False))
        assert tokenizer.exceeds(text, count // 4) and not tokenizer.exceeds(text, count)


def test_what_tekken_cannot_encode_is_an_error_as_there(edited: Callable[..., Path], tekken: Tokenizer) -> None:
    for tokenizer in (tekken, Tokenizer(edited())):
        with pytest.raises(ValueError, match="Max stack size exceeded"):
            tokenizer.encode(" " * 1_000_000)


# ---- text that stays text


@pytest.mark.parametrize("special", [True, False])
def test_text_never_becomes_an_added_token(special: bool, edited: Callable[..., Path]) -> None:
    """Whether it is a control token or not, listed in the vocabulary, a piece of punctuation, or what merges make."""
    merged = written(b" return")

    def edit(data: Json) -> None:
        size = len(data["model"]["vocab"])
        data["model"]["vocab"]["<<>>"] = size
        data["added_tokens"] += [added(size, "<<>>", special=special), added(size + 1, "<|im_end|>", special=special)]
        data["added_tokens"].append(added(data["model"]["vocab"][merged], merged, special=special))

    path = edited(edit)
    library = tokenizers.Tokenizer.from_str(json.dumps(json.loads(path.read_text()) | {"added_tokens": []}))
    tokenizer = Tokenizer(path)
    ids = {token.id for token in tokenizer.added_tokens}
    assert set(library.encode(" return").ids) & ids  # as the model does without its added tokens
    text = "a <<>> <|im_end|> [INST]</s> return <unk>"
    for one in (text, "<<>>", "<|im_end|>", " return", "</s>"):
        made = tokenizer.encode(one, bos=False)
        assert not ids & set(made)
        assert tokenizer.decode(made) == one
    end = tokenizer.added_id("<|im_end|>")
    assert end is not None and tokenizer.is_special(end) is special
    assert tokenizer.decode([end]) == ("" if special else "<|im_end|>")
    assert tokenizer.decode([end], skip_special_tokens=False) == "<|im_end|>" == tokenizer.decode_token(end)


def test_flags_and_roles_of_the_other_files_count(edited: Callable[..., Path], tiny_json: Json) -> None:
    def edit(data: Json) -> None:
        data["added_tokens"] += [added(6144, "<|im_start|>", special=False), added(6145, "<|im_end|>", special=False)]

    path = edited(
        edit, eos_token={"__type": "AddedToken", "content": "<|im_end|>"}, bos_token=None, add_bos_token=False
    )
    config = json.loads((path.parent / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"]["6144"] |= {"special": True, "rstrip": True}
    config["added_tokens_decoder"]["6146"] = {"content": "<tool>", "special": False, "lstrip": True}
    (path.parent / "tokenizer_config.json").write_text(json.dumps(config))
    (path.parent / "special_tokens_map.json").write_text(json.dumps({"bos_token": "[PREFIX]", "eos_token": "</s>"}))
    tokenizer = Tokenizer(path)
    assert (tokenizer.eos_id, tokenizer.bos_id, tokenizer.vocab_size) == (6145, 11, 6147)
    start, end, tool = tokenizer.added_tokens[-3:]
    assert (start.special, start.rstrip, end.special, tool.special, tool.lstrip) == (True, True, True, False, True)
    assert tokenizer.encode("a") == tokenizer.encode("a", bos=False)


def test_only_tokenizer_json(edited: Callable[..., Path], tekken: Tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    path = edited()
    (path.parent / "tokenizer_config.json").unlink()
    tokenizer = load_tokenizer(path.parent)
    assert tokenizer is not None and (tokenizer.bos_id, tokenizer.eos_id) == (1, None)
    assert tokenizer.encode("Hello </s>") == tekken.encode("Hello </s>")
    assert caplog.text == ""


@pytest.mark.parametrize("adds", [True, False])
def test_add_bos_token_counts(adds: bool, edited: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    def edit(data: Json) -> None:
        if adds:
            data["post_processor"] = None

    tokenizer = Tokenizer(edited(edit, add_bos_token=adds, add_eos_token=True))
    assert tokenizer.encode("a") == [1] * adds + tokenizer.encode("a", bos=False)
    assert f"add_bos_token is {adds} and counts" in caplog.text and "gets no end-of-sequence token" in caplog.text


def test_ids_equal_those_of_transformers(edited: Callable[..., Path]) -> None:
    from transformers import AutoTokenizer

    def edit(data: Json) -> None:
        data["added_tokens"] += [added(6144 + index, name) for index, name in enumerate(CHATML)]

    path = edited(edit, eos_token="<|im_end|>")
    theirs, ours = AutoTokenizer.from_pretrained(path.parent), Tokenizer(path)
    for text in ("Hello world", "  two\n", "日本 é", ""):
        assert ours.encode(text) == theirs(text).input_ids
    start, end = map(ours.added_id, CHATML)
    assert [start, *ours.encode_span("user\nhi "), end, *ours.encode_span("\n")] == theirs(
        "<|im_start|>user\nhi <|im_end|>\n", add_special_tokens=False
    ).input_ids
    assert ours.eos_id == theirs.eos_token_id == end


# ---- which file serves


def test_of_two_files_with_equal_tokens_tekken_serves(edited: Callable[..., Path], tekken: Tokenizer) -> None:
    folder = edited().parent
    shutil.copy(TEKKEN, folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None and tokenizer.fingerprint == tekken.fingerprint
    assert tokenizer.describe() == "tekken.json, v3-tekken, as tokenizer.json has the same tokens"
    assert tekken.describe() == "tekken.json, v3-tekken"


def renamed(data: Json) -> None:
    for token_id, name in zip((14, 15), CHATML):
        data["added_tokens"][token_id]["content"] = name
        del data["model"]["vocab"][f"<SPECIAL_{token_id}>"]
        data["model"]["vocab"][name] = token_id


def grown(data: Json) -> None:
    data["added_tokens"] += [added(6144 + index, name) for index, name in enumerate(CHATML)]


def swapped(data: Json) -> None:
    vocab = data["model"]["vocab"]
    first, second = written(b" the"), written(b" of")
    vocab[first], vocab[second] = vocab[second], vocab[first]


@pytest.mark.parametrize(
    ("edit", "config", "reason"),
    [
        (renamed, {"eos_token": CHATML[1]}, "token 14 is '[PREFIX]' there and '<|im_start|>' in tokenizer.json"),
        (grown, {}, "there are 6144 tokens, and 6146 in tokenizer.json"),
        (swapped, {}, "token 1"),
        (lambda data: None, {"eos_token": "[INST]"}, "eos_id is 2 there and 3 with tokenizer.json"),
    ],
)
def test_a_stale_tekken_file_does_not_serve(
    edit: Callable[[Json], object],
    config: Json,
    reason: str,
    edited: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = edited(edit, **config).parent
    shutil.copy(TEKKEN, folder)
    tokenizer = load_tokenizer(folder)
    assert tokenizer is not None and tokenizer.path.name == "tokenizer.json"
    assert reason in tokenizer.note and reason in tokenizer.describe() and reason in caplog.text


def test_beside_a_tekken_file_a_broken_one_is_left_aside(
    tmp_path: Path, tekken: Tokenizer, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copy(TEKKEN, tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": {"type": "WordPiece", "vocab": {"a": 0}}}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None and tokenizer.fingerprint == tekken.fingerprint
    assert "WordPiece" in caplog.text and "tokenizer.json cannot be used" in tokenizer.describe()


def test_a_tekken_file_needs_no_other_library(tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; from pathlib import Path; from nemo_engine.text import load_tokenizer\n"
        f"load_tokenizer(Path({str(TEKKEN.parent)!r})); print('tokenizers' in sys.modules, 'transformers' in "
        "sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "False False\n"


def test_the_fingerprint_tells_behaviour_apart(edited: Callable[..., Path], tiny_json: Json) -> None:
    def fingerprint(edit: Callable[[Json], object] = lambda data: None, **config: Any) -> str:
        return Tokenizer(edited(edit, **config)).fingerprint

    def respaced(data: Json) -> None:
        data["model"]["merges"] = [merge.split(" ") for merge in data["model"]["merges"]]

    usual = fingerprint()
    assert fingerprint(respaced) == usual
    others = [
        fingerprint(renamed),
        fingerprint(grown),
        fingerprint(swapped),
        fingerprint(without(None, None, 2)),
        fingerprint(with_regex(LLAMA_3)),
        fingerprint(add_bos_token=False),
        fingerprint(lambda data: data["added_tokens"][20].update(special=False)),
    ]
    assert len({usual, *others}) == 8


# ---- broken files


def put(*path: Any) -> Callable[[Json], object]:
    """An edit: the value at the end, under the names before it."""

    def edit(data: Json) -> None:
        *names, last, value = path
        for name in names:
            data = data[name]
        data[last] = value

    return edit


def drop(*path: Any) -> Callable[[Json], object]:
    def edit(data: Json) -> None:
        for name in path[:-1]:
            data = data[name]
        del data[path[-1]]

    return edit


SEQUENCE = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
REMOVING = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
NAMED = {"SpecialToken": {"id": "<x>", "type_id": 0}}


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (drop("model"), "model must be an object, got None"),
        (put("model", "type", "WordPiece"), "model.type must be BPE, got 'WordPiece'"),
        (put("model", "type", "Unigram"), "model.type must be BPE, got 'Unigram'"),
        (put("model", "type", 3), "model.type must be BPE, got 3"),
        (put("model", "vocab", [["a", -1.0]]), "model.vocab must be an object of tokens and their ids"),
        (put("model", "vocab", {}), "model.vocab must be an object of tokens and their ids"),
        (put("model", "vocab", "a", "b"), r"model.vocab\['a'\] must be an id from 0 to \d+, got 'b'"),
        (put("model", "vocab", "a", True), r"model.vocab\['a'\] must be an id"),
        (put("model", "vocab", "a", 1 << 40), r"model.vocab\['a'\] must be an id"),
        (put("model", "vocab", "a", -1), r"model.vocab\['a'\] must be an id"),
        (put("model", "vocab", "a", 2000), "model.vocab gives id 2000 to both"),
        (put("model", "vocab", "aéq", 6200), "model.vocab and added_tokens have no token 6144, and go up to 6200"),
        (put("model", "vocab", "é中", 6144), "model.vocab is not written in GPT-2's alphabet of bytes"),
        (put("model", "vocab", "\ud800", 6144), "model.vocab is not written in GPT-2's alphabet of bytes"),
        (drop("model", "vocab", "a"), "no token 1097"),
        (lambda data: data["added_tokens"].append(added(1097, "a")), "model.vocab has no token for byte 0x61"),
        (put("model", "merges", None), "model.merges must be a list"),
        (put("model", "merges", 7, "abc"), r"model.merges\[7\] must be two tokens, got 'abc'"),
        (put("model", "merges", 7, [1, 2]), r"model.merges\[7\] must be two tokens, got \[1, 2\]"),
        (put("model", "dropout", 0.1), "model.dropout must be none"),
        (put("model", "end_of_word_suffix", "</w>"), "model.end_of_word_suffix must be empty, got '</w>'"),
        (put("model", "byte_fallback", "yes"), "model.byte_fallback must be true or false, got 'yes'"),
        (put("added_tokens", {"a": 1}), "added_tokens must be a list"),
        (put("added_tokens", 3, "content", None), r"added_tokens\[3\].content must be a text, got None"),
        (put("added_tokens", 3, "content", "\ud800"), r"added_tokens\[3\].content must be Unicode text"),
        (put("added_tokens", 3, "id", "3"), r"added_tokens\[3\].id must be an integer"),
        (put("added_tokens", 3, "special", 1), r"added_tokens\[3\].special must be true or false, got 1"),
        (put("added_tokens", 3, 7), r"added_tokens\[3\] must be an object, got 7"),
        (put("added_tokens", 3, "content", "[TOOL_CALLS]"), r"added_tokens\[3\] gives '\[TOOL_CALLS\]' id 3, and model.vocab gives it 9"),
        (put("added_tokens", 14, "content", "<|im_start|>"), r"added_tokens\[14\] gives id 14 to '<\|im_start\|>', and '<SPECIAL_14>' has it"),
        (lambda data: data["added_tokens"].append(added(6144, "a")), "gives 'a' id 6144, and model.vocab gives it 1097"),
        (lambda data: data["added_tokens"].append(added(6150, "<x>")), "have no token 6144, and go up to 6150"),
        (lambda data: data["added_tokens"].extend([added(6144, "<x>"), added(6145, "<x>")]), "gives '<x>' id 6145, and "
                                                                                             "it has 6144"),
        (put("normalizer", {"type": "NFC"}), "normalizer must be none for byte-level BPE, got NFC"),
        (put("normalizer", SEQUENCE), "normalizer must be none for byte-level BPE, got NFC"),
        (put("normalizer", "Lowercase"), "normalizer must be none for byte-level BPE, got Lowercase"),
        (put("pre_tokenizer", None), "pre_tokenizer must have one step ByteLevel"),
        (put("pre_tokenizer", {"type": "Whitespace"}), "pre_tokenizer must be of .*, got Whitespace"),
        (put("pre_tokenizer", "pretokenizers", 0, REMOVING), "pre_tokenizer must not remove what it cuts at: Split does"),
        (put("pre_tokenizer", "pretokenizers", 1, "add_prefix_space", True), "pre_tokenizer.add_prefix_space must be "
                                                                             "false"),
        (put("pre_tokenizer", "pretokenizers", 0, "pattern", {"Regex": "("}), "Oniguruma error"),
        (put("decoder", {"type": "WordPiece"}), r"decoder must be ByteLevel for byte-level BPE, got \['WordPiece'\]"),
        (put("decoder", None), r"decoder must be ByteLevel for byte-level BPE, got \[\]"),
        (put("post_processor", {"type": "BertProcessing"}), "post_processor.type must be TemplateProcessing, .*, got "
                                                            "'BertProcessing'"),
        (put("post_processor", "single", 0, NAMED), r"post_processor.single\[0\] names no token of post_processor.special_tokens"),
        (put("post_processor", "single", []), "post_processor.single must hold the text once, and holds it 0 times"),
        (put("post_processor", "special_tokens", "<s>", "ids", [9999]), "stands for ids that are no tokens"),
        (put("post_processor", "special_tokens", "<s>", "ids", 1), "stands for ids that are no tokens"),
    ],
)  # fmt: skip
def test_broken_tokenizer_files(edit: Callable[[Json], object], reason: str, tiny_json: Json, tmp_path: Path) -> None:
    data = copy.deepcopy(tiny_json)
    edit(data)
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"tokenizer file .*tokenizer\.json cannot be (used|read): .*{reason}"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("tokenizer_config.json", "{", "JSONDecodeError"),
        ("tokenizer_config.json", "[]", "it must hold an object"),
        ("tokenizer_config.json", '{"bos_token": "<s>", "bos_token": "</s>"}', "'bos_token' stands twice in one object"),
        ("tokenizer_config.json", '{"bos_token": "<start>"}', "bos_token is '<start>', which tokenizer.json does not "
                                                              "have"),
        ("tokenizer_config.json", '{"eos_token": {"content": 7}}', "eos_token.content must be a text, got 7"),
        ("tokenizer_config.json", '{"eos_token": 7}', "eos_token must be a text, got 7"),
        ("tokenizer_config.json", '{"add_bos_token": "yes"}', "add_bos_token must be true or false, got 'yes'"),
        ("tokenizer_config.json", '{"add_bos_token": true}', "add_bos_token is true, and no bos_token is named"),
        ("tokenizer_config.json", '{"added_tokens_decoder": []}', ""),
        ("tokenizer_config.json", '{"added_tokens_decoder": [1]}', "added_tokens_decoder must be an object"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"a": {}}}', r"added_tokens_decoder\['a'\] must be named by an id"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"14": {"content": "<|im_start|>"}}}',
         r"added_tokens_decoder\['14'\] is '<\|im_start\|>', and tokenizer.json gives id 14 to '<SPECIAL_14>'"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"6144": {"content": "</s>"}}}', "is '</s>', and "
                                                                                             "tokenizer.json gives "
                                                                                             "it id 2"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"6145": {"content": "<x>"}}}', "have no token 6144"),
        ("tokenizer_config.json", '{"additional_special_tokens": "<s>"}', "additional_special_tokens must be a list"),
        ("special_tokens_map.json", '{"eos_token": "<end>"}', "eos_token is '<end>', which tokenizer.json does not have"),
        ("special_tokens_map.json", "null", "it must hold an object"),
        ("tokenizer.json", "", "JSONDecodeError"),
        ("tokenizer.json", "{}", "model must be an object"),
        ("tokenizer.json", "[" * 100_000, "RecursionError"),
        ("tokenizer.json", '{"model": ' + "[" * 500, "JSONDecodeError"),
        ("tokenizer.json", "version https://git-lfs.github.com/spec/v1", "JSONDecodeError"),
    ],
)  # fmt: skip
def test_broken_files_beside_it(
    name: str, content: str, reason: str, edited: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path = edited()
    (path.parent / "tokenizer_config.json").unlink()
    (path.parent / name).write_text(content)
    if not reason:
        assert load_tokenizer(path.parent) is not None
        return
    with pytest.raises(ValueError, match=f"tokenizer file .*cannot be (used|read): .*{reason}"):
        load_tokenizer(path.parent)


def test_a_huge_file_is_not_read(edited: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_engine.text.hf_files.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read: .* bytes, and at most 1000 are read"):
        Tokenizer(edited())


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (put("normalizer", {"type": "Lowercase"}), "normalizer may put \u2581 in front and for spaces, got .*Lowercase"),
        (put("pre_tokenizer", "replacement", "_"), "pre_tokenizer.replacement must be \u2581"),
        (put("pre_tokenizer", "prepend_scheme", "often"), "pre_tokenizer.prepend_scheme must be always, first or "
                                                          "never, got 'often'"),
        (put("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": False}), "pre_tokenizer must not be ByteLevel"),
        (put("decoder", "decoders", 0, {"type": "Lowercase"}), "decoder may be of .*Lowercase"),
        (put("decoder", "decoders", []), "decoder must make \u2581 a space"),
        (put("model", "vocab", "<0x0A>", 700), "no token 13"),
        (put("model", "vocab", "\ud800", 292), "must be Unicode text"),
        (lambda data: data["added_tokens"].append(added(13, "<0x0A>")), "has no token for byte 0x0A"),
    ],
)  # fmt: skip
def test_broken_files_with_byte_fallback(edit: Callable[[Json], object], reason: str, tmp_path: Path) -> None:
    data = byte_fallback(WORDS)
    edit(data)
    with pytest.raises(ValueError, match=rf"tokenizer\.json cannot be (used|read): .*{reason}"):
        Tokenizer(write(tmp_path, data))


def test_names_that_no_text_needs_are_said(edited: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="nemo_engine"):
        Tokenizer(edited(pad_token="[PAD]", additional_special_tokens=["<a>", {"content": "[INST]"}]))
    assert "pad_token is '[PAD]', which tokenizer.json does not have: it is not used" in caplog.text
    assert "additional_special_tokens[0] is '<a>'" in caplog.text
