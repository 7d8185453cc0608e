"""What the fuzz tries: a model, engines and requests, each drawn from its own seeded generator, so that leaving one out
changes no other.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from nemo_engine import RepetitionDetection, RequestOutputKind
from nemo_engine.config import ModelConfig
from tests.helpers.checkpoints import tiny_config

TOKENS = 6144  # of the bundled tokenizer
# Ids as clients write them, and what may stand before and after one in a name that an engine makes of it for itself.
IDS = ("x", "x", "x", "0", "x-0", "x#1", "é\0 ", "", "x" * 3000)
BEFORE = ("", "", "", "", "0-", "1-", "0_", "1_")
AFTER = ("", "", "", "#0", "#1", "-0", "-1", "_0", "_1", ":1", "#1#2")


@dataclass
class ModelCase:
    """A random checkpoint. ``text``: with the bundled tokenizer."""

    config: ModelConfig
    seed: int
    layout: str  # "hf" or "mistral"
    shards: int
    text: bool


@dataclass
class RequestCase:
    """One request: what it asks, when it comes, and when it is aborted, in steps."""

    index: int
    name: str
    prompt: list[int]
    params: dict[str, Any]
    salt: str | None
    priority: int
    arrival: int
    abort: int | None  # after so many steps; None for never


@dataclass
class EngineCase:
    """One engine with its requests. ``fault``: what breaks, and in which step."""

    seed: str
    model: ModelCase
    options: dict[str, Any]
    requests: list[RequestCase]
    fault: tuple[str, int] | None = None
    counts: dict[str, int] = field(default_factory=dict)


def model_case(seed: int) -> ModelCase:
    """The model of ``seed``."""
    rng = random.Random(f"model {seed}")
    num_kv_heads = rng.choice([1, 1, 2, 3])
    text = rng.random() < 0.3
    vocab = rng.choice([TOKENS, TOKENS, TOKENS + 7, 5000]) if text else rng.choice([11, 29, 97, 97, 300])
    eos: Any = [rng.randrange(vocab) for _ in range(rng.choice([0, 1, 1, 2]))]
    config = tiny_config(
        vocab_size=vocab,
        hidden_size=rng.choice([8, 16, 24, 40]),
        num_layers=rng.choice([1, 1, 1, 2, 3]),
        num_kv_heads=num_kv_heads,
        num_heads=num_kv_heads * rng.choice([1, 2, 4]),
        head_dim=rng.choice([2, 8, 16, 32]),
        intermediate_size=rng.choice([7, 16, 40]),
        rope_theta=rng.choice([1e3, 1e4, 1e6]),
        rms_norm_eps=rng.choice([1e-6, 1e-5, 1e-2]),
        tie_word_embeddings=rng.random() < 0.3,
        eos_token_ids=tuple(dict.fromkeys(eos)),
    )
    layout = rng.choice(["hf", "hf", "mistral"])
    if layout == "mistral":  # which cannot say its end
        config = tiny_config(**{**_fields(config), "eos_token_ids": (2,)})
    return ModelCase(config, seed, layout, rng.choice([1, 1, 3]), text)


def _fields(config: ModelConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in config.__slots__}


def engine_case(seed: int, number: int) -> EngineCase:
    """The ``number``-th engine of the model of ``seed``."""
    model = model_case(seed)
    rng = random.Random(f"engine {seed} {number}")
    page_size = rng.choice([16, 16, 16, 32])
    num_pages = rng.choice([3, 4, 6, 9, 14, 40])
    max_num_seqs = rng.choice([1, 2, 4, 4, 8])
    dtype = rng.choice(["float64"] * 7 + ["float32", "float32", "bfloat16"])
    options = {
        "dtype": dtype,
        "kv_cache_dtype": "fp8" if dtype == "float64" and rng.random() < 0.3 else "auto",
        "page_size": page_size,
        "num_kv_pages": num_pages,
        "max_model_len": min(160, rng.choice([num_pages * page_size, max(20, num_pages * page_size // 2)])),
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": rng.choice([max_num_seqs, max_num_seqs + 3, 16, 32, 64, 512]),
        "enable_prefix_caching": rng.random() < 0.7,
        "pipeline_depth": rng.choice([1, 1, 2]),
        "scheduling_policy": rng.choice(["fcfs", "fcfs", "priority"]),
        "max_logprobs": 30,
        "seed": rng.randrange(5),
    }
    options["max_num_batched_tokens"] = max(options["max_num_batched_tokens"], max_num_seqs)
    dice = random.Random(f"drafts {seed} {number}")
    if dice.random() < 0.6:
        options["speculative_config"] = {"method": "ngram", "num_speculative_tokens": dice.choice([1, 2, 3, 5, 7, 7])}
    shared = [[rng.randrange(model.config.vocab_size) for _ in range(options["max_model_len"])] for _ in range(2)]
    count = rng.randint(5, 11)
    requests = [request_case(f"{seed} {number}", index, model, options, shared) for index in range(count)]
    fault = None
    if rng.random() < 0.45:
        fault = (rng.choice(FAULTS), rng.randint(2, 40))
    if max_num_seqs > 1 and rng.random() < 0.5:  # steps that prefill what never decodes, between steps that only decode
        params = {"max_tokens": 1, "seed": 1, "output_kind": RequestOutputKind.FINAL_ONLY}
        for index in range(count, count + 12):
            prompt = [rng.randrange(model.config.vocab_size) for _ in range(rng.randint(1, 3))]
            arrival = rng.randint(4, 60)
            requests.append(RequestCase(index, f"r{index}", prompt, dict(params), None, 0, arrival, None))
    requests += named_alike(f"{seed} {number}", len(requests), model, options)
    return EngineCase(f"{seed} {number}", model, options, requests, fault)


FAULTS = ("launch", "result", "interrupt", "nan", "nan", "inner", "inner interrupt")


def request_case(
    seed: str, index: int, model: ModelCase, options: dict[str, Any], shared: list[list[int]]
) -> RequestCase:
    """The ``index``-th request of an engine; ``shared`` are beginnings that several prompts have."""
    rng = random.Random(f"request {seed} {index}")
    vocab, room = model.config.vocab_size, options["max_model_len"]
    is_short = rng.random() < 0.4  # comes and goes beside those that decode
    longest = max(1, min(room - 1, 12 if is_short else rng.choice([5, 20, 50, room])))
    length = rng.randint(1, longest)
    cut = rng.choice([0, 0, length, rng.randint(0, length)])
    prompt = [*rng.choice(shared)[:cut], *[rng.randrange(vocab) for _ in range(length - cut)]][:length]
    most = room - length
    max_tokens: int | None = (
        rng.choice([1, 1, 2]) if is_short else rng.choice([rng.randint(1, min(12, most)), min(most, 40), min(most, 70)])
    )
    if rng.random() < 0.1:
        max_tokens = rng.choice([most + 5, None]) if room <= 100 else 50
    params = _params(rng, model, max_tokens)
    return RequestCase(
        index,
        client_id(rng) if rng.random() < 0.25 else f"r{index}",
        prompt,
        params,
        rng.choice([None, None, None, "x", "y"]),
        rng.choice([0, 0, 1, -1]) if options["scheduling_policy"] == "priority" else 0,
        rng.choice([0, rng.randint(0, 10), rng.randint(0, 40)]),
        rng.randint(0, 30) if rng.random() < 0.2 else None,
    )


def client_id(rng: random.Random, base: str | None = None) -> str:
    """An id of ``IDS`` or ``base``, perhaps dressed as the name of another."""
    return rng.choice(BEFORE) + (rng.choice(IDS) if base is None else base) + rng.choice(AFTER)


def named_alike(seed: str, index: int, model: ModelCase, options: dict[str, Any]) -> list[RequestCase]:
    """Requests of several completions, and others beside them whose ids could be the names of these; none in some
    engines.
    """
    rng = random.Random(f"names {seed}")
    if rng.random() < 0.6:
        return []
    base = rng.choice([name for name in IDS if name])
    start, requests = rng.randint(0, 30), []
    for position in range(index, index + rng.randint(3, 5)):
        is_many = rng.random() < 0.5
        room = options["max_model_len"] - 1
        params: dict[str, Any] = {"max_tokens": min(room, rng.choice([2, 12, 30])), "seed": 3, "ignore_eos": True}
        params |= {"n": rng.choice([2, 3])} if is_many else {}
        name = base if is_many else client_id(rng, base)
        prompt = [rng.randrange(model.config.vocab_size)]
        abort = rng.randint(0, 10) if rng.random() < 0.1 else None
        requests.append(RequestCase(position, name, prompt, params, None, 0, start + rng.randint(0, 9), abort))
    return requests


def _params(rng: random.Random, model: ModelCase, max_tokens: int | None) -> dict[str, Any]:
    vocab = model.config.vocab_size
    params: dict[str, Any] = {"max_tokens": max_tokens, "seed": rng.choice([None, 0, 1, 2**64 - 1, 7, 8])}

    def maybe(chance: float, name: str, value: Any) -> None:
        if rng.random() < chance:
            params[name] = value

    def some(most: int) -> list[int]:
        return [rng.randrange(vocab) for _ in range(rng.randint(1, most))]

    if rng.random() < 0.35:
        params["temperature"] = 0.0
    else:
        maybe(0.5, "temperature", rng.choice([0.3, 0.8, 1.5, 2.0]))
        maybe(0.3, "top_k", rng.choice([1, 2, 5, vocab, vocab + 9]))
        maybe(0.3, "top_p", rng.choice([1e-6, 0.3, 0.9, 0.999]))
        maybe(0.2, "min_p", rng.choice([0.01, 0.2, 1.0]))
        maybe(0.25, "n", rng.choice([2, 2, 3]))
    maybe(0.2, "presence_penalty", rng.choice([-2.0, 0.5, 2.0]))
    maybe(0.2, "frequency_penalty", rng.choice([-1.0, 0.3, 2.0]))
    maybe(0.2, "repetition_penalty", rng.choice([0.5, 1.3, 3.0]))
    maybe(0.2, "logit_bias", {token: rng.choice([-100.0, -1.0, 2.0, 6.0]) for token in some(4)})
    maybe(0.15, "allowed_token_ids", some(6))
    maybe(0.3, "stop_token_ids", some(max(2, min(40, vocab // 6))))
    maybe(0.4, "ignore_eos", True)
    if max_tokens is not None:
        maybe(0.2, "min_tokens", rng.randint(0, min(max_tokens, 6)))
    maybe(0.3, "logprobs", rng.choice([0, 1, 5, min(20, vocab)]))
    maybe(0.3, "prompt_logprobs", rng.choice([0, 0, 2]))
    maybe(0.1, "repetition_detection", RepetitionDetection(3, 1, 2))
    params["output_kind"] = rng.choice(list(RequestOutputKind))
    maybe(0.2, "stream_interval", rng.choice([1, 3]))
    if "logprobs" not in params:
        maybe(0.1, "logprob_token_ids", some(5))
    if model.text:
        maybe(0.3, "stop", [rng.choice("aeiou "), rng.choice(["th", "e", "zz", "in"])])
        maybe(0.2, "bad_words", [rng.choice(["a", "the", "hello"])])
        maybe(0.2, "include_stop_str_in_output", True)
        if rng.random() < 0.3 and "allowed_token_ids" not in params:
            params["structured_outputs"] = rng.choice(
                [
                    {"choice": ["yes", "no", "yellow green", "y"]},
                    {"regex": "[a-f]{3,12}"},
                    {"choice": ["Zürich 2", "Zug"]},
                ]
            )
    return params
