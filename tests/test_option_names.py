"""Options that this engine does not have: each is refused by name, with what to use instead."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
from typing import Any

import pytest

from nemo_engine import AsyncEngine, Engine, EngineConfig, SamplingParams, StructuredOutputsParams
from nemo_engine.cli import build_parser
from nemo_engine.option_names import ELSEWHERE, advice
from nemo_engine.server.options import ServerOptions
from nemo_engine.server.protocol import UNSUPPORTED

FIELDS = {
    field.name
    for cls in (EngineConfig, SamplingParams, ServerOptions, StructuredOutputsParams)
    for field in dataclasses.fields(cls)
}


def test_the_table_names_what_there_is() -> None:
    assert not ELSEWHERE.keys() & FIELDS
    for name, text in ELSEWHERE.items():
        assert set(re.findall(r"\{(\w+)\}", text)) <= FIELDS | {"progress"}, name
        assert "{" not in advice(name, ())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpu_memory_utilization": 0.9}, "'gpu_memory_utilization': memory is planned .*kv_cache_gib"),
        ({"gpu_memory_utilisation": 0.9}, "'gpu_memory_utilisation': gpu_memory_utilization: memory is planned"),
        ({"trust_remote_code": True}, "no code of a checkpoint is ever run"),
        ({"swap_space": 4}, "nothing is swapped"),
        ({"device_map": "auto"}, "'device_map': use device$"),
        ({"torch_dtype": "auto"}, "'torch_dtype': use dtype$"),
        ({"load_in_8bit": True}, "'load_in_8bit': use quantization 'fp8'"),
        ({"enable_lora": True}, "use lora$"),
        ({"max_model_length": 5}, "did you mean max_model_len"),
        ({"temperature": 0}, r"it belongs to a request's parameters \(SamplingParams\)"),
        ({"zzz": 1}, "Engine has no option 'zzz'$"),
    ],
)
def test_options_of_the_engine(options: dict[str, Any], message: str) -> None:
    for make in (
        lambda: EngineConfig(**options),
        lambda: Engine("nowhere", **options),
        lambda: AsyncEngine("no", **options),
    ):
        with pytest.raises(ValueError, match=f"Engine has no option .*{message}|{message}"):
            make()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 5}, "SamplingParams has no option 'max_new_tokens': use max_tokens$"),
        ({"do_sample": False}, "use temperature: 0 is greedy"),
        ({"best_of": 3}, "use n, and choose by cumulative_logprob"),
        ({"guided_json": {}}, "use structured_outputs with json$"),
        ({"guided_regex": "a"}, "use structured_outputs with regex$"),
        ({"temprature": 0.5}, "did you mean temperature"),
        ({"max_model_len": 5}, r"it belongs to the engine's options \(Engine\)"),
    ],
)
def test_parameters_of_a_request(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**options)
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(SamplingParams(), **options)
    with pytest.raises(ValueError, match="StructuredOutputsParams has no option 'jsn': did you mean json"):
        StructuredOutputsParams(jsn="{}")  # type: ignore[call-arg]


def test_copies_are_made_as_before() -> None:
    for made in (SamplingParams(n=2, top_p=0.5), EngineConfig(seed=3), StructuredOutputsParams(choice=["a", "b"])):
        assert pickle.loads(pickle.dumps(made)) == copy.deepcopy(made) == copy.copy(made) == made
        assert dataclasses.replace(made) == made


def test_arguments_of_calls() -> None:
    options: dict[str, Any] = {"device": "cpu", "num_kv_pages": 8, "max_model_len": 64}
    with Engine("nemo-tiny", **options) as engine:
        for call in (engine.generate, engine.stream):
            with pytest.raises(ValueError, match="has no option 'use_tqdm': use progress"):
                call("a", use_tqdm=False)
        for call in (engine.chat, engine.stream_chat):
            with pytest.raises(ValueError, match="has no option 'max_tokens': it belongs to a request's parameters"):
                call([{"role": "user", "content": "a"}], max_tokens=3)
        with pytest.raises(ValueError, match="chat has no option 'max_tokens'"):
            engine.inputs.encode_conversations([{"role": "user", "content": "a"}], max_tokens=3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("serve m --gpu-memory-utilization 0.9", "--gpu-memory-utilization: .* set --kv-cache-gib or --num-kv-pages"),
        ("serve m --max-model-length=5", "--max-model-length: did you mean --max-model-len?"),
        ("serve m --trust-remote-code", "--trust-remote-code: no code of a checkpoint is ever run"),
        ("serve m --temperature 0", "--temperature: it belongs to a request's parameters"),
        ("generate m --max-new-tokens 5", "--max-new-tokens: use --max-tokens "),
        ("generate m --zzz", r"unrecognized arguments: --zzz \(nemo-engine generate --help"),
        ("info m --gibb 3", "--gibb: did you mean --gib?"),
    ],
)
def test_flags(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        build_parser().parse_args(arguments.split())
    assert re.search(message, capsys.readouterr().err)


def test_fields_that_the_server_refuses_have_advice() -> None:
    named = {name for name in UNSUPPORTED if name in ELSEWHERE}
    assert {"best_of", "guided_json", "guided_regex", "use_beam_search", "logits_processors"} <= named
