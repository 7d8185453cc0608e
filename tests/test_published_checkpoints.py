"""Checkpoints as people publish them, each from its files to the answers of a server: whose tokens, template and ends
serve.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import PreTrainedTokenizerFast

from nemo_engine import AsyncEngine, Engine, SamplingParams
from nemo_engine.checkpoint.checkpoint import open_checkpoint
from nemo_engine.cli.info import text_rows
from nemo_engine.config import ModelConfig
from nemo_engine.quantize import quantize_checkpoint
from tests.helpers import hf_tokenizers
from tests.helpers.checkpoints import random_adapter, random_state_dict, tiny_config, write_adapter, write_hf
from tests.helpers.fp8_checkpoints import write_fp8
from tests.server.live import LiveServer
from tests.text.chat_templates import CHATML, HERMES, LLAMA, MINITRON, NEMO, TINY, ZEPHYR

SIZE = 1500  # ids of the tokenizer before it grows
OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "float32", "page_size": 16, "num_kv_pages": 160, "max_num_seqs": 4,
    "max_num_batched_tokens": 512, "max_model_len": 1024,
}  # fmt: skip
SYSTEM = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "What is 2 + 2? \u65e5\u672c"}
ANSWER = {"role": "assistant", "content": "It is 4."}
THANKS = {"role": "user", "content": "Thanks!"}
TOOL = {
    "type": "function",
    "function": {
        "name": "pick",
        "description": "Pick a letter.",
        "parameters": {
            "type": "object",
            "properties": {"letter": {"type": "string", "enum": ["a", "b"]}},
            "required": ["letter"],
            "additionalProperties": False,
        },
    },
}
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 22]}}, "required": ["n"], "additionalProperties": False}


@dataclass(frozen=True)
class Published:
    """A checkpoint in ``model``, with the files of its text in ``text``.

    ``ends`` close a turn; ``takes_tools``: its template does.
    """

    model: Path
    text: Path
    ends: tuple[int, ...]
    renderer: str = "template"
    takes_tools: bool = False
    lora: str | None = None


def write_text(folder: Path, names: dict[int, str], texts: tuple[str, ...] = (), **config: Any) -> int:
    """``tokenizer.json`` in which ids have these names, those beyond the vocabulary too, ``texts`` no control tokens;
    returns the number of ids.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cut = hf_tokenizers.cut_tekken(TINY, SIZE, folder.parent / "tekken.json")
    grown = [names[i] for i in sorted(names) if i >= SIZE]
    data = hf_tokenizers.tekken_as_hf(cut, {i: name for i, name in names.items() if i < SIZE}, grown)
    for token in data["added_tokens"]:
        if token["content"] in texts:
            token |= {"special": False, "normalized": True}
    hf_tokenizers.write(folder, data, hf_tokenizers.config_of(data, **config))
    return SIZE + len(grown)


def write_model(folder: Path, size: int, *, is_tied: bool = False, **changes: Any) -> ModelConfig:
    config = tiny_config(vocab_size=size, tie_word_embeddings=is_tied)
    write_hf(folder, config, random_state_dict(config), **changes)
    return config


CHATML_NAMES = {SIZE: "<|im_start|>", SIZE + 1: "<|im_end|>"}
TAGS = ("<tool_call>", "</tool_call>")
RENAMED = {14: "<|im_start|>", 15: "<|im_end|>", 16: TAGS[0], 17: TAGS[1]}


def chatml_grown_by_two(folder: Path) -> Published:
    write_model(folder, write_text(folder, CHATML_NAMES, chat_template=CHATML, eos_token="<|im_end|>"))
    return Published(folder, folder, (SIZE + 1,))


def renamed_ids(folder: Path) -> Published:
    """``eos_token`` stays what it was: the template alone says what ends a turn."""
    write_model(folder, write_text(folder, RENAMED, TAGS, chat_template=HERMES))
    return Published(folder, folder, (15, 2), takes_tools=True)


def template_in_its_own_file(folder: Path) -> Published:
    """Beside an old one, and in two files of weights."""
    names = dict(enumerate(("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), SIZE))
    config = tiny_config(vocab_size=write_text(folder, names, chat_template=CHATML))
    write_hf(folder, config, random_state_dict(config), shards=2)
    (folder / "chat_template.jinja").write_text(LLAMA)
    return Published(folder, folder, (SIZE + 2, 2))


def named_templates(folder: Path) -> Published:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": HERMES}]
    write_model(folder, write_text(folder, RENAMED, chat_template=named))
    return Published(folder, folder, (15, 2), takes_tools=True)


def minitron(folder: Path) -> Published:
    """Its shape has queries as wide as the hidden states; LlamaForCausalLM; and no name for the end of a turn but the
    next turn's beginning.
    """
    size = write_text(folder, {14: "<extra_id_0>", 15: "<extra_id_1>"}, chat_template=MINITRON)
    config = tiny_config(vocab_size=size, hidden_size=32, num_heads=4, num_kv_heads=1, head_dim=8, intermediate_size=90)
    llama = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False, "pretraining_tp": 1}
    write_hf(folder, config, random_state_dict(config), **llama)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 15], "do_sample": True}))
    return Published(folder, folder, (15, 2))


def fp8_without_tekken(folder: Path) -> Published:
    """Mistral's own template: its renderer serves, though tokenizer.json is all there is."""
    shape = {"num_heads": 2, "num_kv_heads": 2, "head_dim": 64, "hidden_size": 128, "intermediate_size": 128}
    config = tiny_config(vocab_size=write_text(folder, {}, chat_template=NEMO), **shape)
    write_fp8(folder, config, random_state_dict(config), "compressed-tensors dynamic")
    return Published(folder, folder, (2,), "mistral", takes_tools=True)


def tied_and_padded(folder: Path) -> Published:
    """No control tokens but Mistral's; more rows than tokens, and a name of its own in front of the tensors."""
    write_text(folder, {}, chat_template=ZEPHYR)
    config = tiny_config(vocab_size=1536, tie_word_embeddings=True)
    state = {name.replace("model.", "language_model.", 1): x for name, x in random_state_dict(config).items()}
    write_hf(folder, config, state)
    return Published(folder, folder, (2,))


def adapter(folder: Path) -> Published:
    """It brings a grown vocabulary with the rows for it, and a template; its model has Mistral's."""
    base, path = folder / "base", folder / "adapter"
    write_text(base, {}, chat_template=NEMO)
    config = write_model(base, SIZE)
    names = CHATML_NAMES | {SIZE + 2: TAGS[0], SIZE + 3: TAGS[1]}
    grown = tiny_config(vocab_size=write_text(path, names, TAGS, eos_token="<|im_end|>"))
    rows = random_state_dict(grown, seed=3)
    whole = {f"base_model.model.{x}": rows[x] for x in ("model.embed_tokens.weight", "lm_head.weight")}
    write_adapter(path, random_adapter(config) | whole, modules_to_save=["embed_tokens", "lm_head"])
    (path / "chat_template.jinja").write_text(HERMES)
    return Published(base, path, (SIZE + 1,), takes_tools=True, lora=str(path))


ALL = (
    chatml_grown_by_two, renamed_ids, template_in_its_own_file, named_templates, minitron, fp8_without_tekken,
    tied_and_padded, adapter,
)  # fmt: skip


class Kit:
    """A checkpoint, an engine that runs it, a server of it, and transformers' tokenizer."""

    def __init__(self, published: Published, engine: Engine, server: LiveServer) -> None:
        self.published, self.engine, self.server = published, engine, server
        self.theirs = PreTrainedTokenizerFast.from_pretrained(published.text)

    def their_ids(self, messages: list[dict[str, Any]], **options: Any) -> list[int]:
        options = {"add_generation_prompt": True, "return_dict": False} | options
        return list(self.theirs.apply_chat_template(copy.deepcopy(messages), **options))

    def post(self, path: str, **body: Any) -> dict[str, Any]:
        answer = httpx.post(self.server.url + path, json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        made: dict[str, Any] = answer.json()
        return made

    def chat(self, **body: Any) -> dict[str, Any]:
        made: dict[str, Any] = self.post("/v1/chat/completions", **body)["choices"][0]
        return made

    def events(self, path: str, **body: Any) -> Iterator[dict[str, Any]]:
        with httpx.stream("POST", self.server.url + path, json=body | {"stream": True}, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    yield json.loads(line[6:])


@pytest.fixture(scope="module", params=ALL, ids=lambda make: make.__name__)
def kit(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Kit]:
    published: Published = request.param(tmp_path_factory.mktemp("published") / "model")
    options = OPTIONS | {"lora": published.lora}
    with Engine(published.model, **options) as engine, AsyncEngine(published.model, **options) as served:
        with LiveServer(served) as server:
            yield Kit(published, engine, server)


def test_prompts_are_those_of_transformers(kit: Kit) -> None:
    one = SamplingParams(max_tokens=1)
    conversations = [[USER], [SYSTEM, USER], [USER, ANSWER, THANKS], [SYSTEM, USER, ANSWER, THANKS]]
    expected = [kit.their_ids(messages) for messages in conversations]
    assert [output.prompt_token_ids for output in kit.engine.chat(conversations, one)] == expected
    for messages, ids in zip(conversations, expected):
        assert kit.post("/tokenize", messages=messages)["tokens"] == ids
    (output,) = kit.engine.chat([USER, ANSWER], one, continue_final_message=True, add_generation_prompt=False)
    continued = kit.their_ids([USER, ANSWER], continue_final_message=True, add_generation_prompt=False)
    assert output.prompt_token_ids == continued
    text = "def f(x):\n    return '\u00e9 \u65e5'"
    (output,) = kit.engine.generate(text, one)
    assert output.prompt_token_ids == kit.theirs(text)["input_ids"]


def test_the_text_of_a_user_is_text(kit: Kit) -> None:
    names = " ".join(
        token.content for token in kit.theirs.added_tokens_decoder.values() if "SPECIAL" not in token.content
    )
    added = {*kit.theirs.added_tokens_decoder}
    prompts = kit.engine.chat([[{"role": "user", "content": x}] for x in ("hi", names)], SamplingParams(max_tokens=1))
    plain, hostile = ([i for i in output.prompt_token_ids if i in added] for output in prompts)
    assert hostile == plain


def test_the_end_of_a_turn_ends_an_answer(kit: Kit) -> None:
    said = kit.server.service.engine.renderers
    assert said is not None and said.describe()["renderer"] == kit.published.renderer
    for end in kit.published.ends:
        params = SamplingParams(logit_bias={end: 100.0}, max_tokens=9)
        (output,) = kit.engine.chat([USER], params)
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("", "stop")
        body = {"messages": [USER], "logit_bias": {str(end): 100}, "max_tokens": 9, "min_tokens": 2}
        choice = kit.chat(**body, return_token_ids=True)
        assert choice["finish_reason"] == "stop"
        assert choice["token_ids"][2:] == [end] and end not in choice["token_ids"][:2]


def test_answers_whole_and_streamed(kit: Kit) -> None:
    asked: dict[str, Any] = {"max_tokens": 12, "temperature": 1.0, "seed": 5, "skip_special_tokens": False}
    params = SamplingParams(**asked)
    (whole,) = kit.engine.chat([SYSTEM, USER], params)
    text = whole.outputs[0].text
    assert text and "".join(part.outputs[0].text for part in kit.engine.stream_chat([SYSTEM, USER], params)) == text
    body = asked | {"messages": [SYSTEM, USER]}
    choice = kit.chat(**body, return_token_ids=True)
    assert choice["message"]["content"] == text and choice["token_ids"] == whole.outputs[0].token_ids
    deltas = [event["choices"][0]["delta"] for event in kit.events("/v1/chat/completions", **body)]
    assert "".join(delta.get("content") or "" for delta in deltas) == text
    (completed,) = kit.engine.generate("Once", params)
    answer = kit.post("/v1/completions", prompt="Once", **asked)
    assert completed.outputs[0].text and answer["choices"][0]["text"] == completed.outputs[0].text


def test_answers_of_the_responses_route(kit: Kit) -> None:
    body = {"instructions": SYSTEM["content"], "input": USER["content"], "max_output_tokens": 12, "temperature": 1.0}
    expected = kit.chat(messages=[SYSTEM, USER], max_tokens=12, temperature=1.0, seed=5)["message"]["content"]
    made = kit.post("/v1/responses", **body, seed=5)
    assert made["output"][0]["content"][0]["text"] == expected
    events = list(kit.events("/v1/responses", **body, seed=5))
    assert "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta") == expected


def test_json_schema(kit: Kit) -> None:
    params = SamplingParams(max_tokens=60, temperature=1.0, seed=1, structured_outputs={"json": SCHEMA})
    (output,) = kit.engine.chat([USER], params)
    assert output.outputs[0].finish_reason == "stop" and json.loads(output.outputs[0].text)["n"] in (1, 22)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    choice = kit.chat(messages=[USER], response_format=form, max_tokens=60, temperature=1.0, seed=1)
    assert choice["finish_reason"] == "stop" and choice["message"]["content"] == output.outputs[0].text


def test_tools(kit: Kit) -> None:
    if not kit.published.takes_tools:
        with pytest.raises(
            ValueError, match="tools are not taken: the chat template of .* shows the model none|not read"
        ):
            kit.engine.chat([USER], tools=[TOOL])
        body = {"messages": [USER], "tools": [TOOL], "max_tokens": 4}
        refused = httpx.post(kit.server.url + "/v1/chat/completions", json=body, timeout=60)
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "tools"
        return
    call = {"id": "abcdefgh1", "type": "function", "function": {"name": "pick", "arguments": {"letter": "a"}}}
    called = [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "pick", "tool_call_id": "abcdefgh1", "content": '{"is": "a"}'},
    ]
    for messages in ([USER], called):
        (output,) = kit.engine.chat(messages, SamplingParams(max_tokens=1), tools=[TOOL])
        assert output.prompt_token_ids == kit.their_ids(messages, tools=[TOOL])
    body = {"messages": [USER], "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False, "seed": 2}
    choice = kit.chat(**body, max_tokens=100, temperature=1.0)
    (made,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] is None
    assert made["function"]["name"] == "pick" and json.loads(made["function"]["arguments"])["letter"] in ("a", "b")
    pieces = [
        piece["function"].get("arguments", "")
        for event in kit.events("/v1/chat/completions", **body, max_tokens=100, temperature=1.0)
        for piece in event["choices"][0]["delta"].get("tool_calls", ())
    ]
    assert "".join(pieces) == made["function"]["arguments"]


@pytest.mark.parametrize("brings", ["tokenizer", "template", "template among the settings", "nothing"])
def test_what_an_adapter_lacks_of_tokenizer_and_template_is_the_models(brings: str, tmp_path: Path) -> None:
    """When it is served, and when it is written with the model."""
    base, path, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    config = write_model(base, write_text(base, RENAMED, chat_template=CHATML))
    write_adapter(path, random_adapter(config))
    template, name = CHATML, "tokenizer_config.json"
    if brings == "tokenizer":
        write_text(path, RENAMED | {16: "<other>"})
        (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": None}))
    elif brings != "nothing":
        template = CHATML.replace("assistant", "bot")
        if brings == "template":
            name = "chat_template.jinja"
            (path / name).write_text(template)
        else:
            (base / "chat_template.jinja").write_text(ZEPHYR)
            (path / name).write_text(json.dumps({"chat_template": template}))
    expected = PreTrainedTokenizerFast.from_pretrained(base).apply_chat_template(
        [USER], chat_template=template, add_generation_prompt=True, return_dict=False
    )
    quantize_checkpoint(base, out, lora=path)
    for model, options in ((base, {"lora": str(path)}), (out, {})):
        with Engine(model, **OPTIONS, **options) as engine:
            (output,) = engine.chat([USER], SamplingParams(max_tokens=1))
            assert output.prompt_token_ids == list(expected)
            assert engine.tokenizer is not None
            assert engine.tokenizer.special_text(16) == ("<other>" if brings == "tokenizer" else TAGS[0])
        rows = dict(text_rows(open_checkpoint(model, **options)))
        assert rows["chat"].startswith(f"by the template of {name}")
