"""Flags are the fields of the two classes, with their types, and reach them."""

from __future__ import annotations

import argparse
import dataclasses

import pytest

from nemo_engine.cli import arguments
from nemo_engine.config import EngineConfig
from nemo_engine.sampling_params import SamplingParams


def _help() -> str:
    parser = argparse.ArgumentParser()
    arguments.add_sampling_arguments(parser)
    return parser.format_help()


def parse(*argv: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    arguments.add_sampling_arguments(parser)
    arguments.add_engine_arguments(parser)
    return parser.parse_args(["some-model", *argv])


def test_every_engine_field_has_a_flag_and_nothing_is_passed_that_was_not_given() -> None:
    assert arguments.engine_options(parse()) == {}
    assert arguments.sampling_options(parse()) == {}
    for field in dataclasses.fields(EngineConfig):
        name = "engine_seed" if field.name == "seed" else field.name
        value = {"prefer": "op=impl", "speculative_config": '{"method": "ngram"}'}.get(field.name, "1")
        flag = "--" + name.replace("_", "-")
        options = arguments.engine_options(parse(flag) if field.type == "bool" else parse(flag, value))
        assert set(options) == {field.name}


def test_every_sampling_field_has_a_flag_or_is_excluded_by_name() -> None:
    names = {field.name for field in dataclasses.fields(SamplingParams)}
    assert arguments.NO_FLAGS <= names
    for name in names - arguments.NO_FLAGS:
        assert name in arguments.field_helps(SamplingParams) or f"``{name}``" in str(SamplingParams.__doc__), name
        assert f"--{name.replace('_', '-')}" in _help()


def test_help_comes_from_the_docstring() -> None:
    helps = arguments.field_helps(EngineConfig)
    assert helps["max_num_seqs"] == "requests that run at once."
    assert set(helps) == {field.name for field in dataclasses.fields(EngineConfig)}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--max-model-len", "auto"], {"max_model_len": "auto"}),
        (["--max-model-len", "4096"], {"max_model_len": 4096}),
        (["--max-model-len", "none"], {"max_model_len": None}),
        (["--kv-cache-gib", "0.5"], {"kv_cache_gib": 0.5}),
        (["--no-enable-prefix-caching"], {"enable_prefix_caching": False}),
        (
            ["--prefer", "rms_norm=triton", "--prefer", "silu_mul=torch"],
            {"prefer": {"rms_norm": "triton", "silu_mul": "torch"}},
        ),
        (["--engine-seed", "3"], {"seed": 3}),
    ],
)
def test_engine_values(argv: list[str], expected: dict[str, object]) -> None:
    assert arguments.engine_options(parse(*argv)) == expected


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--stop", "a", "--stop", "=b"], {"stop": ["a", "=b"]}),
        (["--stop-token-ids", "2,10"], {"stop_token_ids": [2, 10]}),
        (["--logit-bias", "5=-1.5", "--logit-bias", "6=2"], {"logit_bias": {5: -1.5, 6: 2.0}}),
        (["--max-tokens", "none"], {"max_tokens": None}),
        (["--top-k=-1"], {"top_k": -1}),
        (["--seed", "3"], {"seed": 3}),
        (["--ignore-eos", "--n", "2"], {"ignore_eos": True, "n": 2}),
        (["--structured-outputs", '{"choice": ["a", "b"]}'], {"structured_outputs": {"choice": ["a", "b"]}}),
    ],
)
def test_sampling_values(argv: list[str], expected: dict[str, object]) -> None:
    options = arguments.sampling_options(parse(*argv))
    assert options == expected
    SamplingParams(**options)


@pytest.mark.parametrize(
    "argv",
    [["--max-tokens", "x"], ["--logit-bias", "5"], ["--logit-bias", "a=1"], ["--prefer", "rms_norm"], ["--stop-token-ids", "1,,2"],
     ["--max-num", "3"], ["--max-model-len", "lots"], ["--structured-outputs", "{"], ["--structured-outputs", "[]"]],
)  # fmt: skip
def test_ill_formed_values_end_with_usage(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(*argv)
    assert argv[0] in capsys.readouterr().err


def test_one_sampling_option_as_text() -> None:
    assert arguments.parse_sampling_option("top_p=0.5") == {"top_p": 0.5}
    assert arguments.parse_sampling_option("ignore_eos=false") == {"ignore_eos": False}
    assert arguments.parse_sampling_option("stop=a=b") == {"stop": ["a=b"]}
    for text, message in [
        ("top_p", "KEY=VALUE"),
        ("topp=1", "unknown sampling option 'topp': did you mean top_p?"),
        ("max_new_tokens=1", "unknown sampling option 'max_new_tokens': use max_tokens"),
        ("detokenize=false", "unknown sampling option"),
        ("max_tokens=x", "invalid int value: 'x'"),
        ("ignore_eos=1", "ignore_eos must be true or false"),
    ]:
        with pytest.raises(ValueError, match=message):
            arguments.parse_sampling_option(text)
