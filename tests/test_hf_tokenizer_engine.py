"""An engine with ``tokenizer.json`` in the place of ``tekken.json`` does the same, and one with a grown vocabulary
shows its tokens.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nemo_engine import Engine, SamplingParams
from nemo_engine.cli import main
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf
from tests.helpers.hf_tokenizers import added, config_of, tekken_as_hf, write

TINY = Path(__file__).parents[1] / "nemo_engine" / "assets" / "nemo-tiny"
OPTIONS: dict[str, Any] = {"device": "cpu", "num_kv_pages": 64, "max_model_len": 256, "max_num_seqs": 8}
START, END, TOOL = 6144, 6145, 6146


@pytest.fixture(scope="module")
def tiny_json() -> dict[str, Any]:
    return tekken_as_hf(TINY / "tekken.json")


@pytest.fixture(scope="module")
def engines(tiny_json: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Engine, Engine]]:
    """nemo-tiny with its Tekken file, and with ``tokenizer.json``."""
    folder = tmp_path_factory.mktemp("tiny")
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(TINY / name, folder)
    write(folder, tiny_json)
    with Engine("nemo-tiny", **OPTIONS) as tekken, Engine(folder, **OPTIONS) as hf:
        assert hf.tokenizer is not None and hf.tokenizer.version == "byte-level-bpe"
        yield tekken, hf


@pytest.mark.parametrize(
    "params",
    [
        {"logprobs": 3, "prompt_logprobs": 1},
        {"stop": ["the", "\n\n"], "include_stop_str_in_output": True},
        {"bad_words": ["the", "return", " "]},
        {"skip_special_tokens": False, "min_tokens": 10},
        {"structured_outputs": {"regex": r"[a-zé]{3,9}(, \d+)*"}},
        {"structured_outputs": {"json": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}}},
        {"structured_outputs": {"choice": ["</s>", "[INST]", "日本"]}},
    ],
    ids=str,
)  # fmt: skip
def test_completions_are_those_of_tekken(engines: tuple[Engine, Engine], params: dict[str, Any]) -> None:
    prompts = ["def f(x):", "The [INST] of </s> is", "日本 é"]
    sampling = [SamplingParams(max_tokens=24, seed=seed, **params) for seed in range(3)]
    tekken, hf = (engine.generate(prompts, sampling) for engine in engines)
    for theirs, ours in zip(tekken, hf):
        assert ours.prompt_token_ids == theirs.prompt_token_ids
        assert ours.prompt_logprobs == theirs.prompt_logprobs
        assert ours.outputs == theirs.outputs


@pytest.fixture(scope="module")
def grown(tiny_json: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two control tokens and one that is text, a stale ``tekken.json``, and rows padded to a multiple of 64."""
    folder = tmp_path_factory.mktemp("grown")
    more = [added(START, "<|im_start|>"), added(END, "<|im_end|>"), added(TOOL, "<tool_call>", special=False)]
    data = tiny_json | {"added_tokens": tiny_json["added_tokens"] + more}
    config = tiny_config(vocab_size=6208, eos_token_ids=(END,))
    write_hf(folder, config, random_state_dict(config))
    write(folder, data, config_of(data, eos_token="<|im_end|>"))
    shutil.copy(TINY / "tekken.json", folder)
    return folder


def test_a_grown_vocabulary(grown: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    reason = "there are 6144 tokens, and 6147 in tokenizer.json"
    with caplog.at_level(logging.INFO, logger="nemo_engine"), Engine(grown, **OPTIONS) as engine:
        assert f"tokenizer: tokenizer.json, byte-level-bpe, as tekken.json has other tokens: {reason}" in caplog.text
        assert "the model has 6208 token ids, its tokenizer 6147" in caplog.text
        text = "<|im_start|>a<tool_call><|im_end|>"
        named = SamplingParams(max_tokens=1, allowed_token_ids=[TOOL], logprobs=1, ignore_eos=True)
        (output,) = engine.generate(text, named)
        assert output.prompt_token_ids[0] == 1 and not {START, END, TOOL} & {*output.prompt_token_ids}
        assert output.outputs[0].text == "<tool_call>"
        assert output.outputs[0].logprobs[0][TOOL].decoded_token == "<tool_call>"  # type: ignore[index]
        for is_shown in (False, True):
            params = SamplingParams(
                max_tokens=1, allowed_token_ids=[START], skip_special_tokens=not is_shown, ignore_eos=True
            )
            assert engine.generate("a", params)[0].outputs[0].text == "<|im_start|>" * is_shown
        ending = SamplingParams(structured_outputs={"regex": "a{3}"}, max_tokens=9)
        (output,) = engine.generate("a", ending)
        assert output.outputs[0].text == "aaa" and output.outputs[0].token_ids[-1] == END
        written = SamplingParams(structured_outputs={"choice": [text]}, max_tokens=60)
        (output,) = engine.generate("a", written)
        assert output.outputs[0].text == text and START not in output.outputs[0].token_ids
        free = SamplingParams(max_tokens=60, ignore_eos=True, temperature=2.0, seed=1)
        assert max(engine.generate("a", free)[0].outputs[0].token_ids) < 6147
    assert main(["info", str(grown)]) == 0
    shown = capsys.readouterr().out
    assert f"tokenizer.json, byte-level-bpe, as tekken.json has other tokens: {reason}; 6147 ids" in shown


def test_a_vocabulary_that_the_model_has_too_few_rows_for(
    grown: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(vocab_size=6000)
    write_hf(tmp_path, config, random_state_dict(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(grown / name, tmp_path)
    with Engine(tmp_path, **OPTIONS) as engine:
        assert (
            "the model has 6000 token ids, its tokenizer 6147: text that takes one from 6000 on is refused"
            in caplog.text
        )
        tokenizer = engine.tokenizer
        assert tokenizer is not None
        last = next(i for i in range(6143, 6000, -1) if tokenizer.encode(tokenizer.decode([i]), bos=False) == [i])
        with pytest.raises(ValueError, match=f"{last}"):
            engine.generate(tokenizer.decode([last]))
        (output,) = engine.generate("a", SamplingParams(structured_outputs={"regex": "[a-z]{9}"}, max_tokens=20))
        assert len(output.outputs[0].text) == 9


def test_a_broken_file_is_refused_before_the_weights_are_read(grown: Path, tmp_path: Path) -> None:
    shutil.copytree(grown, tmp_path, dirs_exist_ok=True)
    (tmp_path / "tekken.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "WordPiece", "vocab": {"a": 0}}}))
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be used: model.type must be BPE, got 'WordPiece'"):
        Engine(tmp_path, **OPTIONS)
    assert main(["info", str(tmp_path)]) != 0
    with Engine(tmp_path, skip_tokenizer_init=True, **OPTIONS) as engine:
        (output,) = engine.generate({"prompt_token_ids": [1, 2000]}, SamplingParams(max_tokens=2, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 2
