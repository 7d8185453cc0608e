"""Structured outputs through the whole engine: what comes out parses and validates, in any company, and the company is
not disturbed.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from nemo_engine import Engine, SamplingParams
from nemo_engine.outputs import RequestOutput
from nemo_engine.text.grammar import Grammar, tool_call_grammar
from nemo_engine.text.tools import check_tools, tool_call_schema
from tests.helpers.checked import check_every_step
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf
from tests.text.test_grammar import PERSON
from tests.text.test_tokenizer import TINY

PAGE = 16
LIST = {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 8}
FORMS: list[dict[str, Any]] = [
    {"json": PERSON},
    {"json": LIST, "disable_any_whitespace": True},
    {"regex": r"[a-z]{3,12}-\d{2,20}"},
    {"choice": ["yes", "no", "perhaps not today"]},
    {"grammar": 'root ::= "x"{3,9} ("y" | "z"){0,20}'},
]


def check(form: dict[str, Any], text: str) -> None:
    if "json" in form:
        jsonschema.validate(json.loads(text), form["json"])
        assert len(text) < 400
    elif "regex" in form:
        assert re.fullmatch(form["regex"], text)
    elif "choice" in form:
        assert text in form["choice"]
    else:
        assert re.fullmatch("x{3,9}[yz]{0,20}", text)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("random")
    config = tiny_config(vocab_size=6144)
    return write_hf(path, config, random_state_dict(config, seed=1))


def make_engine(model: Path, **options: Any) -> Engine:
    defaults: dict[str, Any] = {
        "dtype": "float64", "device": "cpu", "page_size": PAGE, "num_kv_pages": 100, "max_num_seqs": 12,
        "max_num_batched_tokens": 256, "max_model_len": 512, "tokenizer": str(TINY),
    }  # fmt: skip
    return check_every_step(Engine(model, **(defaults | options)))


def make_workload(count: int = 15) -> tuple[list[dict[str, Any]], list[SamplingParams], list[dict[str, Any] | None]]:
    """Two of three requests have a form."""
    rng = random.Random(7)
    prompts, params, forms = [], [], []
    for index in range(count):
        form = None if index % 3 == 2 else FORMS[index % len(FORMS)]
        more: dict[str, Any] = {"temperature": 0.0} if index % 4 == 3 else {"temperature": 1.0, "seed": index}
        more |= rng.choice(
            [{}, {"top_p": 0.9}, {"repetition_penalty": 1.2, "presence_penalty": 0.3}, {"top_k": 50, "min_p": 0.01}]
        )
        prompts.append(
            {"prompt_token_ids": [rng.randrange(1000, 6144) for _ in range(rng.choice([1, 15, 16, 17, 30]))]}
        )
        params.append(
            SamplingParams(
                max_tokens=30 if form is None else 200, ignore_eos=form is None, structured_outputs=form, **more
            )
        )
        forms.append(form)
    return prompts, params, forms


def tokens(outputs: list[RequestOutput]) -> list[tuple[list[int], str | None]]:
    return [(output.outputs[0].token_ids, output.outputs[0].finish_reason) for output in outputs]


@pytest.fixture(scope="module")
def alone(model: Path) -> list[tuple[list[int], str | None]]:
    prompts, params, _ = make_workload()
    with make_engine(model, max_num_seqs=1, enable_prefix_caching=False) as engine:
        return [tokens(engine.generate(prompt, own))[0] for prompt, own in zip(prompts, params)]


VARIANTS: dict[str, dict[str, Any]] = {
    "batched": {},
    "overlapped": {"pipeline_depth": 2},
    "chunked, overlapped": {"pipeline_depth": 2, "max_num_batched_tokens": 13},
    "preempted": {"num_kv_pages": 16, "max_model_len": 240, "enable_prefix_caching": False},
    "preempted, overlapped": {"num_kv_pages": 16, "max_model_len": 240, "pipeline_depth": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_do_not_depend_on(model: Path, alone: Any, variant: str) -> None:
    prompts, params, forms = make_workload()
    with make_engine(model, **VARIANTS[variant]) as engine:
        outputs = engine.generate(prompts, params)
        assert tokens(outputs) == alone
        stats = engine.stats()
        assert (stats.num_running, stats.num_waiting, stats.num_free_pages) == (0, 0, stats.num_pages)
        assert (stats.total_preemptions > 0) == variant.startswith("preempted")
    for output, form in zip(outputs, forms):
        if form is not None:
            assert output.outputs[0].finish_reason == "stop"
            check(form, output.outputs[0].text)


def test_the_company_of_constrained_requests_changes_no_free_token(model: Path, alone: Any) -> None:
    prompts, params, forms = make_workload()
    free = [index for index, form in enumerate(forms) if form is None]
    with make_engine(model, pipeline_depth=2) as engine:
        assert tokens(engine.generate([prompts[i] for i in free], [params[i] for i in free])) == [
            alone[i] for i in free
        ]


# ---- a trained model


@pytest.fixture(scope="module", params=[1, 2])
def trained(request: pytest.FixtureRequest) -> Iterator[Engine]:
    with Engine(
        "nemo-tiny", device="cpu", num_kv_pages=300, max_model_len=1024, max_num_seqs=40, pipeline_depth=request.param
    ) as engine:
        yield engine


@pytest.mark.parametrize("form", FORMS, ids=lambda form: next(iter(form)))
def test_every_seed_gives_a_valid_text(trained: Engine, form: dict[str, Any]) -> None:
    params = [SamplingParams(seed=seed, max_tokens=300, structured_outputs=form) for seed in range(30)]
    outputs = trained.generate(["The heapq module"] * 30, params)
    assert len({output.outputs[0].text for output in outputs}) > 1
    for output in outputs:
        assert output.outputs[0].finish_reason == "stop" and output.outputs[0].stop_reason is None
        assert output.outputs[0].token_ids[-1] == 2
        check(form, output.outputs[0].text)


def test_completions_of_one_prompt_have_a_grammar_each(trained: Engine) -> None:
    form = {"json": PERSON}
    (output,) = trained.generate("A list is", SamplingParams(n=6, seed=3, max_tokens=300, structured_outputs=form))
    for index, completion in enumerate(output.outputs):
        check(form, completion.text)
        (single,) = trained.generate(
            "A list is", SamplingParams(seed=3 + index, max_tokens=300, structured_outputs=form)
        )
        assert single.outputs[0].token_ids == completion.token_ids


def test_streams_logprobs_stops_and_limits(trained: Engine) -> None:
    form = {"json": LIST, "disable_any_whitespace": True}
    params = SamplingParams(seed=1, max_tokens=200, structured_outputs=form, logprobs=1)
    text, entries = "", []
    for delta in trained.stream("x", params):
        text += delta.outputs[0].text
        entries += delta.outputs[0].logprobs or []
    check(form, text)
    # Raw log-probabilities: where the grammar leaves little, the likeliest token is often another one.
    assert any(entry[chosen].rank != 1 for entry in entries for chosen in list(entry)[:1])
    (cut,) = trained.generate("x", SamplingParams(seed=1, max_tokens=3, structured_outputs={"regex": "[a-z]{40}"}))
    assert cut.outputs[0].finish_reason == "length" and len(cut.outputs[0].token_ids) == 3
    (stopped,) = trained.generate(
        "x", SamplingParams(seed=1, max_tokens=90, stop="7", structured_outputs={"regex": "[67]{40}"})
    )
    assert stopped.outputs[0].finish_reason == "stop" and set(stopped.outputs[0].text) <= {"6"}


def test_ignore_eos_ends_where_the_grammar_does(trained: Engine) -> None:
    form = {"regex": r"\d{3}"}
    (output,) = trained.generate("x", SamplingParams(seed=1, max_tokens=50, ignore_eos=True, structured_outputs=form))
    assert re.fullmatch(r"\d{3}", output.outputs[0].text) and output.outputs[0].finish_reason == "stop"
    assert output.outputs[0].token_ids[-1] != 2


def test_what_other_parameters_leave_nothing_of_is_an_error_of_its_own(trained: Engine) -> None:
    choice = {"choice": ["yes"]}
    bad = SamplingParams(seed=1, min_tokens=9, structured_outputs=choice)
    outputs = trained.generate(["x", "x"], [bad, SamplingParams(seed=1, structured_outputs=choice)])
    assert outputs[0].outputs[0].finish_reason == "error" and "structured_outputs" in (
        outputs[0].outputs[0].error or ""
    )
    assert (
        outputs[0].outputs[0].text == outputs[1].outputs[0].text == "yes"
        and outputs[1].outputs[0].finish_reason == "stop"
    )


def test_a_tool_call_is_forced(trained: Engine) -> None:
    assert trained.tokenizer is not None and trained.tokenizer.tool_calls_id is not None
    tools = check_tools([{"type": "function", "function": {"name": "set", "parameters": PERSON}}])
    form = tool_call_grammar(trained.tokenizer.tool_calls_id, tool_call_schema(tools))
    messages = [{"role": "user", "content": "Hello"}]
    params = SamplingParams(n=8, seed=2, max_tokens=600, structured_outputs=form)
    (output,) = trained.chat(messages, params, tools=tools)
    assert all(one.token_ids[0] == trained.tokenizer.tool_calls_id for one in output.outputs)
    ended = [one for one in output.outputs if one.finish_reason == "stop"]  # it may call the tool again and again
    assert ended
    for call in [call for one in ended for call in json.loads(one.text)]:
        assert call["name"] == "set"
        jsonschema.validate(call["arguments"], PERSON)


@pytest.mark.parametrize("method", ["mask", "accept", "copy of another length"])
def test_a_grammar_that_dies_ends_its_request_alone(
    trained: Engine, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    form = {"regex": "[a-z]{30}"}
    params = [SamplingParams(seed=seed, max_tokens=60, structured_outputs=form) for seed in range(3)]
    expected = trained.generate(["x"] * 3, params)
    for index, own in enumerate(params):
        trained.add_request(f"r{index}", "x", own)
    victim = list(trained._core.scheduler.requests.values())[1].grammar
    name = "mask" if method.startswith("copy") else method
    original, calls = getattr(Grammar, name), []

    def dying(self: Grammar, *args: Any) -> Any:
        if self is victim:
            calls.append(args)
            if len(calls) > 4:
                if method.startswith("copy"):
                    return b"\xff" * 8
                raise RuntimeError("planted")
        return original(self, *args)

    monkeypatch.setattr(Grammar, name, dying)
    final = {}
    while trained.has_unfinished_requests():
        final |= {output.request_id: output for output in trained.step()}
    ended = final["r1"].outputs[0]
    assert ended.finish_reason == "error" and ended.token_ids == expected[1].outputs[0].token_ids[:4]
    assert ("together leave no token" if method.startswith("copy") else "RuntimeError: planted") in (ended.error or "")
    for index in (0, 2):
        assert tokens([final[f"r{index}"]]) == tokens([expected[index]])
    assert trained.stats().num_free_pages == trained.stats().num_pages


def test_bad_forms_are_refused_before_anything_is_queued(trained: Engine) -> None:
    good = SamplingParams(structured_outputs={"regex": "a"})
    bad = SamplingParams(structured_outputs={"json": {"type": "array", "uniqueItems": True}})
    for call in (
        lambda: trained.generate(["x", "x"], [good, bad]),
        lambda: trained.stream("x", bad),
        lambda: trained.add_request("bad", "x", bad),
    ):
        with pytest.raises(ValueError, match="structured_outputs.json: uniqueItems at # is not supported"):
            call()
    assert not trained.has_unfinished_requests() and trained.stats().num_waiting == 0


def test_it_needs_a_tokenizer() -> None:
    with Engine("nemo-tiny", device="cpu", num_kv_pages=16, max_model_len=64, skip_tokenizer_init=True) as engine:
        with pytest.raises(ValueError, match="structured_outputs needs a tokenizer, and this engine has none"):
            engine.generate({"prompt_token_ids": [1]}, SamplingParams(structured_outputs={"regex": "a"}))
