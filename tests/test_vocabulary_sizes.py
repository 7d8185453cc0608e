"""Checkpoints with more rows than their tokenizer has tokens, or fewer; and that what one request's tokens become ends
no other.
"""

from __future__ import annotations

import asyncio
import logging
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from nemo_engine import AsyncEngine, Engine, RequestOutput, SamplingParams
from nemo_engine.cli import main
from nemo_engine.text import Tokenizer
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf

TEKKEN = Path(__file__).parents[1] / "nemo_engine" / "assets" / "nemo-tiny" / "tekken.json"
TOKENS = 6144  # of that tokenizer
ROWS = 6200
EOS = 6199  # beyond it, as checkpoints have that were tuned with a turn's end of their own
OPTIONS: dict[str, Any] = {"device": "cpu", "num_kv_pages": 40, "max_model_len": 512, "max_num_seqs": 8}


def write(path: Path, rows: int, *eos: int) -> Path:
    """Untrained rows beyond the tokenizer are far likelier than all others."""
    config = tiny_config(vocab_size=rows, eos_token_ids=eos)
    state = random_state_dict(config)
    state["lm_head.weight"][TOKENS:] *= 40.0
    write_hf(path, config, state)
    shutil.copy(TEKKEN, path)
    return path


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("padded"), ROWS, 2)


@pytest.fixture(scope="module")
def engine(padded: Path) -> Any:
    with Engine(padded, **OPTIONS) as engine:
        yield engine


def ids_of(engine: Engine, **params: Any) -> list[int]:
    wanted = {"max_tokens": 24, "ignore_eos": True, "seed": 3} | params
    (output,) = engine.generate("Hello", SamplingParams(**wanted))
    completion = output.outputs[0]
    assert completion.finish_reason == "length" and completion.error is None
    assert completion.text == engine.tokenizer.decode(completion.token_ids)  # type: ignore[union-attr]
    return completion.token_ids


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 50, "top_p": 0.9, "min_p": 0.001},
        {"repetition_penalty": 1.5, "frequency_penalty": 0.5},
        {"stop_token_ids": [6150]},
        {"logprobs": 2, "logprob_token_ids": [6150, 7]},
        {"logit_bias": {5: 3.0}},
        {"bad_words": ["a"]},
        {"min_tokens": 20},
        {"stop": ["zzzz"]},
        {"structured_outputs": {"regex": "[a-z]{200}"}},
    ],
    ids=str,
)
def test_ids_without_a_token_are_not_chosen(engine: Engine, params: dict[str, Any]) -> None:
    assert max(ids_of(engine, **params)) < TOKENS


def test_ids_that_a_request_names_are_chosen_and_have_no_text(engine: Engine) -> None:
    assert set(ids_of(engine, allowed_token_ids=[6150, 6151], temperature=2.0)) <= {6150, 6151}
    named = ids_of(engine, logit_bias={6150: 100.0, 9: 1.0}, logprobs=1, stop=["zzzz"])
    assert set(named) == {6150}
    assert not {*range(TOKENS, ROWS)} - {6150} & set(ids_of(engine, logit_bias={6150: 0.0}, temperature=2.0))


def test_log_probabilities_are_those_of_the_whole_vocabulary(engine: Engine) -> None:
    prompt = {"prompt_token_ids": [1, 6150, 6199, 5]}
    params = SamplingParams(max_tokens=3, ignore_eos=True, logprobs=3, prompt_logprobs=2, temperature=0.0)
    (output,) = engine.generate(prompt, params)
    entries = [*output.prompt_logprobs[1:], *output.outputs[0].logprobs]  # type: ignore[index,misc]
    assert any(token_id >= TOKENS for entry in entries for token_id in entry)
    for entry in entries:
        for token_id, one in entry.items():
            assert math.isfinite(one.logprob) and (one.decoded_token == "") >= (token_id >= TOKENS)
    assert max(output.outputs[0].token_ids) < TOKENS


def test_the_end_of_a_checkpoint_may_lie_beyond_its_tokenizer(tmp_path: Path) -> None:
    with Engine(write(tmp_path, ROWS, EOS), **OPTIONS) as engine:
        outputs = engine.generate(["Hello"] * 8, [SamplingParams(max_tokens=60, seed=seed) for seed in range(8)])
    assert any(output.outputs[0].finish_reason == "stop" for output in outputs)
    assert all(output.outputs[0].stop_reason is None for output in outputs)
    assert all(i < TOKENS or i == EOS for output in outputs for i in output.outputs[0].token_ids)


def test_sizes_are_compared_and_said(
    padded: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    said = "the model has 6200 token ids, its tokenizer 6144: those from 6144 on have no text"
    assert main(["info", str(padded)]) == 0
    assert said in capsys.readouterr().out
    with caplog.at_level(logging.WARNING, logger="nemo_engine"):
        Engine(padded, **OPTIONS).close()
    assert said in caplog.text
    caplog.clear()
    Engine("nemo-tiny", **OPTIONS).close()
    assert "token ids" not in caplog.text


def test_fewer_rows_than_tokens(tmp_path: Path) -> None:
    config = tiny_config(vocab_size=2000)
    write_hf(tmp_path, config, random_state_dict(config))
    shutil.copy(TEKKEN, tmp_path)
    with Engine(tmp_path, **OPTIONS) as engine:
        engine.add_request("running", {"prompt_token_ids": [1, 5]}, SamplingParams(max_tokens=40, ignore_eos=True))
        engine.step()
        text = "Hello there"
        assert max(engine.tokenizer.encode(text)) >= 2000  # type: ignore[union-attr]
        with pytest.raises(ValueError, match=r"prompt.* must be in \[0, 1999\]"):
            engine.generate(text)
        with pytest.raises(ValueError, match=r"messages\[\d+\] must be in \[0, 1999\]"):
            engine.chat([{"role": "user", "content": text}])
        for wrong in ({"stop_token_ids": [2000]}, {"allowed_token_ids": [6000]}, {"logit_bias": {2000: 1.0}}):
            with pytest.raises(ValueError, match=r"1999"):
                engine.generate({"prompt_token_ids": [1]}, SamplingParams(**wrong))  # type: ignore[arg-type]
        for params in ({"bad_words": [text, " there", "a"]}, {"structured_outputs": {"regex": "[ab]{3}"}}):
            (output,) = engine.generate({"prompt_token_ids": [1, 9]}, SamplingParams(max_tokens=6, **params))  # type: ignore[arg-type]
            assert output.outputs[0].finish_reason in ("length", "stop")
        last: list[RequestOutput] = []
        while engine.has_unfinished_requests():
            last = engine.step() or last
        assert last[0].outputs[0].finish_reason == "length" and len(last[0].outputs[0].token_ids) == 40


BROKEN = 1234  # an id whose bytes cannot be had


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Tokenizer.token_bytes

    def token_bytes(self: Tokenizer, token_id: int, **options: Any) -> bytes:
        if token_id == BROKEN:
            raise RuntimeError("planted")
        return original(self, token_id, **options)

    monkeypatch.setattr(Tokenizer, "token_bytes", token_bytes)


WANTS: list[tuple[str | dict[str, Any], dict[str, Any]]] = [
    ("Hello", {"allowed_token_ids": [BROKEN]}),
    ("Hello", {"allowed_token_ids": [BROKEN], "stop": ["x"]}),
    ("Hello", {"allowed_token_ids": [BROKEN], "logprobs": 1}),
    ("Hello", {"logprob_token_ids": [BROKEN]}),
    ({"prompt_token_ids": [1, BROKEN, 5]}, {"prompt_logprobs": 0, "allowed_token_ids": [4000]}),
]


@pytest.mark.parametrize(("prompt", "params"), WANTS, ids=str)
def test_what_cannot_be_made_into_text_ends_its_own_request(broken: None, prompt: Any, params: dict[str, Any]) -> None:
    plain = SamplingParams(max_tokens=30, ignore_eos=True, allowed_token_ids=[4000], logprobs=0)
    bad = SamplingParams(max_tokens=8, ignore_eos=True, **params)
    with Engine("nemo-tiny", **OPTIONS) as engine:
        wrong, right = engine.generate([prompt, "Hello"], [bad, plain])
        assert wrong.outputs[0].finish_reason == "error" and "planted" in str(wrong.outputs[0].error)
        assert right.outputs[0].finish_reason == "length" and len(right.outputs[0].token_ids) == 30
        assert len(right.outputs[0].logprobs or ()) == 30
        streamed = list(engine.stream([prompt, "Hello"], [bad, plain]))
        assert sum(len(o.outputs[0].token_ids) for o in streamed if o.request_id == "1" and o.outputs) == 30
        for seed in (0, 1):  # aborted with tokens that nobody has read
            engine.add_request("a", prompt, SamplingParams(max_tokens=8, ignore_eos=True, seed=seed, **params))
            outputs = engine.step()
            engine.abort("a")  # unless it has ended by then
            outputs += engine.step()
            assert outputs[-1].finished
        assert not engine.has_unfinished_requests() and engine.stats().num_free_pages == 40

    async def serve() -> None:
        engine = AsyncEngine("nemo-tiny", **OPTIONS)

        async def last(prompt: Any, params: SamplingParams) -> RequestOutput:
            return [output async for output in engine.generate(prompt, params)][-1]

        wrong, right = await asyncio.gather(last(prompt, bad), last("Hello", plain))
        assert (wrong.outputs[0].finish_reason, right.outputs[0].finish_reason) == ("error", "length")
        assert engine.error is None and engine.is_ready
        engine.close()

    asyncio.run(serve())


def test_public_decoding_of_ids() -> None:
    tokenizer = Tokenizer(TEKKEN)
    assert tokenizer.decode([4000, TOKENS, 10**9, 4000]) == tokenizer.decode([4000, 4000])
    with pytest.raises(ValueError, match="a token id must be at least 0, got -1"):
        tokenizer.decode([-1])
