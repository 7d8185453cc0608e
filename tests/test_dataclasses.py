"""Public dataclasses: what a copy, ``dataclasses.replace``, a pickle and ``==`` carry is all that there is."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import pytest

import nemo_engine
from nemo_engine import (
    CompletionOutput,
    Engine,
    EngineConfig,
    Logprob,
    RepetitionDetection,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
    StructuredOutputsParams,
)
from nemo_engine.config import EngineConfig as Config
from nemo_engine.engine.input_processor import InputProcessor
from tests.helpers.checkpoints import tiny_config

# Every value here is one that construction normalises, or leaves to a default of the call.
EXAMPLES: list[Any] = [
    SamplingParams(),
    SamplingParams(temperature=0.0, top_p=0.5, top_k=7, min_p=0.1),
    SamplingParams(temperature=0.005, seed=-1, top_k=-1, logprobs=True),  # type: ignore[arg-type]
    SamplingParams(
        stop="x", stop_token_ids=[3, 3], bad_words=["a", "a"], allowed_token_ids=[4, 4],
        logit_bias={"5": 1000}, extra_args={},  # type: ignore[dict-item]
        structured_outputs={"json": '{"type":  "object"}'}, repetition_detection=RepetitionDetection(3, 1, 2),
    ),
    StructuredOutputsParams(choice=["a", "a"]),
    StructuredOutputsParams(json={"type": "object"}, disable_any_whitespace=True),
    StructuredOutputsParams(json_object=True),
    RepetitionDetection(3, 1, 2),
    EngineConfig(prefer={"*": "x"}, kv_cache_gib=1),
    EngineConfig(),
    tiny_config(),
    Logprob(-1.0, 1, "a"),
    CompletionOutput(0, "a", [1], logprobs=[{1: Logprob(-1.0)}]),
    RequestMetrics(1.0),
    RequestOutput("a", None, [1], [CompletionOutput(0, "", [])], False, sampling_params=SamplingParams()),
]  # fmt: skip


def test_each_public_dataclass_is_tried() -> None:
    public = {
        value for value in map(nemo_engine.__getattr__, nemo_engine.__all__[:-1]) if dataclasses.is_dataclass(value)
    }
    assert public == {type(example) for example in EXAMPLES}
    for one in public:
        hidden = [field.name for field in dataclasses.fields(one) if not (field.init and field.compare)]
        assert not hidden, f"{one.__name__}: {hidden}"


@pytest.mark.filterwarnings("ignore:temperature")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: type(example).__name__)
def test_copies_are_equal_in_every_slot(example: Any) -> None:
    others = [
        copy.copy(example),
        copy.deepcopy(example),
        pickle.loads(pickle.dumps(example)),
        dataclasses.replace(example),
    ]
    others.append(type(example)(**{f.name: getattr(example, f.name) for f in dataclasses.fields(example)}))
    slots = {name for base in type(example).__mro__ for name in getattr(base, "__slots__", ())}
    assert slots == {field.name for field in dataclasses.fields(example)}
    for other in others:
        assert other == example
        for name in slots:
            assert getattr(other, name) == getattr(example, name), name


def test_what_a_greedy_request_does_not_use_is_kept() -> None:
    cut = {"top_p": 0.5, "top_k": 7, "min_p": 0.1}
    changed = dataclasses.replace(SamplingParams(temperature=0.0, **cut), temperature=0.8)  # type: ignore[arg-type]
    assert changed == SamplingParams(temperature=0.8, **cut)  # type: ignore[arg-type]


@pytest.mark.parametrize("is_chat", [False, True])
def test_the_default_temperature_is_that_of_the_call(is_chat: bool) -> None:
    inputs = InputProcessor(tiny_config(), Config(), None, 1024)
    default = 0.3 if is_chat else 1.0
    given = SamplingParams()
    for params in (
        given,
        dataclasses.replace(given, max_tokens=2),
        copy.deepcopy(given),
        pickle.loads(pickle.dumps(given)),
    ):
        assert inputs.effective_params(params, is_chat=is_chat).temperature == default
    for explicit in (1.0, 0.0):
        params = dataclasses.replace(SamplingParams(temperature=explicit), max_tokens=2)
        assert inputs.effective_params(params, is_chat=is_chat).temperature == explicit
    assert given != SamplingParams(temperature=1.0)  # they differ in chat
    with pytest.raises(ValueError, match="n must be 1 with greedy sampling"):
        dataclasses.replace(SamplingParams(n=2), temperature=0.0)


def test_an_output_stays_as_it_was_given() -> None:
    with Engine("nemo-tiny", device="cpu", num_kv_pages=16, max_model_len=512) as engine:
        outputs, seen = [], []
        for output in engine.stream("The heapq", SamplingParams(max_tokens=4, ignore_eos=True, seed=1)):
            outputs.append(output)
            seen.append(copy.deepcopy(output))
    assert len(outputs) == 4 and outputs == seen
