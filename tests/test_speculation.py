"""Speculating changes nothing but how many tokens a step makes: tokens, log-probabilities, ends and pages are the same.

A tiny random model in fp64; widths are chosen at random at every step, and drafts are looked up, right, or arbitrary.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from nemo_engine.config import EngineConfig
from nemo_engine.engine.engine import Engine
from nemo_engine.outputs import RequestOutput
from nemo_engine.sampling_params import RepetitionDetection, SamplingParams
from tests.helpers.checked import check_every_step
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf
from tests.helpers.speculating import choose_widths, plant_drafts, random_drafts, right_drafts

VOCAB, PAGE = 29, 16


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    config = tiny_config(vocab_size=VOCAB)
    return write_hf(path, config, random_state_dict(config, seed=3))


def make_engine(model: Path, **options: Any) -> Engine:
    defaults: dict[str, Any] = {
        "dtype": "float64", "device": "cpu", "page_size": PAGE, "num_kv_pages": 60, "max_num_seqs": 6,
        "max_num_batched_tokens": 96, "max_model_len": 160, "max_logprobs": 5, "scheduling_policy": "priority",
    }  # fmt: skip
    return check_every_step(Engine(model, **(defaults | options)))


def make_workload(seed: int, count: int = 9) -> list[tuple[list[int], dict[str, Any], int]]:
    """Prompts that repeat themselves, with every kind of parameter, and priorities."""
    rng = random.Random(seed)
    requests = []
    for index in range(count):
        length = rng.choice([1, 3, PAGE - 1, PAGE + 1, rng.randint(1, 60)])
        phrase = [rng.randrange(VOCAB) for _ in range(rng.randint(1, 9))]
        prompt = (phrase * length)[:length]
        params: dict[str, Any] = {"max_tokens": rng.choice([1, 2, 7, rng.randint(3, 40)]), "seed": index}
        params |= rng.choice([{"temperature": 0.0}, {"temperature": 0.4}, {"temperature": 0.6, "top_p": 0.9, "n": 2},
                              {"temperature": 0.5, "top_k": 4, "min_p": 0.01}])  # fmt: skip
        params |= rng.choice([{}, {"logprobs": 3}, {"logprob_token_ids": [1, 5]}, {"prompt_logprobs": 1}])
        params |= rng.choice([{}, {}, {"frequency_penalty": 0.4}, {"logit_bias": {3: 2.0}}, {"min_tokens": 1},
                              {"allowed_token_ids": [2, 3, 5, 7, 11]}, {"speculation": False},
                              {"repetition_detection": RepetitionDetection(3, 1, 3)}])  # fmt: skip
        params |= {"stop_token_ids": rng.choice([[], [4], [5, 6]]), "ignore_eos": rng.random() < 0.5}
        requests.append((prompt, params, rng.choice([0, 0, 1])))
    return requests


Told = list[tuple[Any, ...]]


def told(output: RequestOutput) -> Told:
    """All that must be the same, of each completion; log-probabilities to nine digits."""

    def rounded(entries: Any) -> Any:
        return entries and [
            entry and {token: (round(one.logprob, 9), one.rank) for token, one in entry.items()} for entry in entries
        ]

    prompt = rounded(output.prompt_logprobs)
    return [
        (one.token_ids, one.finish_reason, one.stop_reason, rounded(one.logprobs), prompt) for one in output.outputs
    ]


def play(engine: Engine, requests: list[tuple[list[int], dict[str, Any], int]], rng: random.Random) -> dict[int, Told]:
    """All requests, which come at random steps, with a neighbour of each that is aborted; told by index."""
    results: dict[int, Told] = {}
    waiting = list(enumerate(requests))
    steps = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and (steps == 0 or rng.random() < 0.5):
            index, (prompt, params, priority) = waiting.pop(0)
            engine.add_request(f"{index}", {"prompt_token_ids": prompt}, SamplingParams(**params), priority=priority)
            other = {"prompt_token_ids": prompt[:20]}
            engine.add_request(f"x{index}", other, SamplingParams(max_tokens=30, temperature=0.5), priority=priority)
        for output in engine.step():
            if output.finished and not output.request_id.startswith("x"):
                results[int(output.request_id)] = told(output)
        if rng.random() < 0.3:
            engine.abort(f"x{rng.randrange(len(requests))}")
        steps += 1
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_pages) == (0, 0, stats.num_pages)
    return results


VARIANTS: dict[str, dict[str, Any]] = {
    "batched": {},
    "overlapped": {"pipeline_depth": 2},
    "chunked": {"max_num_batched_tokens": 17, "enable_prefix_caching": False},
    "preempted": {"num_kv_pages": 10},
    "overlapped, preempted": {"num_kv_pages": 10, "pipeline_depth": 2, "max_num_batched_tokens": 40},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_comes_out_does_not_depend_on_speculation(model: Path, variant: str) -> None:
    accepted = rejected = preempted = 0
    for seed in range(3):
        requests = make_workload(seed)
        with make_engine(model, max_num_seqs=1) as engine:
            alone = play(engine, requests, random.Random(0))
        texts = [prompt + ids for index, (prompt, *_) in enumerate(requests) for ids, *_ in alone[index]]
        rng = random.Random(seed)
        for count, plant in ((7, None), (3, random_drafts(rng, VOCAB)), (7, right_drafts(texts)), (1, None)):
            config = {"method": "ngram", "num_speculative_tokens": count}
            with make_engine(model, speculative_config=config, **VARIANTS[variant]) as engine:
                choose_widths(engine._core.scheduler, rng, engine.config.widths)
                if plant is not None:
                    plant_drafts(engine, plant)
                assert play(engine, requests, rng) == alone
                stats = engine.stats()
                accepted += sum(stats.num_spec_accepted_tokens_per_pos)
                rejected += stats.num_spec_draft_tokens - sum(stats.num_spec_accepted_tokens_per_pos)
                preempted += stats.total_preemptions
    assert min(accepted, rejected) > 100 and (preempted > 5 or "preempted" not in variant), (accepted, rejected)


@pytest.mark.parametrize("depth", [1, 2])
def test_right_drafts_make_a_text_in_few_steps_and_end_at_its_limit(model: Path, depth: int) -> None:
    prompt, params = [1, 2, 3], SamplingParams(max_tokens=41, temperature=0.0, ignore_eos=True)
    with make_engine(model) as engine:
        expected = engine.generate({"prompt_token_ids": prompt}, params)[0].outputs[0]
    config = {"method": "ngram"}
    with make_engine(model, speculative_config=config, pipeline_depth=depth) as engine:
        engine._core.scheduler.speculation.width_for = lambda *_: 8  # type: ignore[method-assign]
        plant_drafts(engine, right_drafts([prompt + expected.token_ids]))
        got = engine.generate({"prompt_token_ids": prompt}, params)[0].outputs[0]
        assert (got.token_ids, got.finish_reason) == (expected.token_ids, "length")
        wide = [record for record in engine.steps_since(0) if record.num_decodes]
        assert len(wide) == 5, [record.num_new_tokens for record in wide]
        assert engine.stats().num_spec_accepted_tokens_per_pos == (5,) * 7


def test_stop_strings_and_streams_are_those_of_single_tokens() -> None:
    """Text of the bundled model: a stop string inside of drafts ends the tokens where it ends, and deltas add up."""
    prompt = "one two three four one two three four one two three"
    params = [
        SamplingParams(max_tokens=24, temperature=0.0, ignore_eos=True, logprobs=0, **stop)
        for stop in ({}, {"stop": ["e t", "r o"]}, {"stop": ["o"], "include_stop_str_in_output": True})
    ]
    told_by: list[list[tuple[Any, ...]]] = []
    for options in ({}, {"speculative_config": {"method": "ngram"}}):
        with Engine("nemo-tiny", device="cpu", dtype="float32", **options) as engine:
            if options:
                choose_widths(engine._core.scheduler, random.Random(1))
            outputs = [one.outputs[0] for one in engine.generate([prompt] * 3, params)]
            found = [
                (one.text, one.token_ids, one.finish_reason, one.stop_reason, len(one.logprobs)) for one in outputs
            ]
            for own in params:
                deltas = [one.outputs[0] for one in engine.stream(prompt, own)]
                ids = [token_id for delta in deltas for token_id in delta.token_ids]
                assert ("".join(delta.text for delta in deltas), ids) == found[params.index(own)][:2]
            told_by.append(found)
    assert told_by[0] == told_by[1]
    assert told_by[0][1][2] == "stop"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("ngram", "speculative_config must be like"),
        ({}, r'speculative_config\["method"\] must be'),
        ({"method": "eagle"}, r'speculative_config\["method"\] must be'),
        ({"method": "ngram", "num_speculative_tokens": 8}, "must be"),
        ({"method": "ngram", "num_speculative_tokens": True}, "must be"),
        ({"method": "ngram", "model": "x"}, "keys method and num_speculative_tokens, got 'model'"),
        ({"method": "ngram", "prompt_lookup_max": 4}, "leave prompt_lookup_max out"),
    ],
)
def test_other_configurations_are_refused(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(speculative_config=config)


def test_widths_hold_the_drafts() -> None:
    for count in range(1, 8):
        config = EngineConfig(speculative_config={"method": "ngram", "num_speculative_tokens": count})
        assert config.widths[-1] > count >= config.widths[-1] // 2 and config.num_speculative_tokens == count
    assert EngineConfig().widths == () and EngineConfig().num_speculative_tokens == 0


def test_who_has_no_drafts_and_why() -> None:
    assert SamplingParams().why_no_drafts is None
    for options, reason in (
        ({"speculation": False}, "speculation is false"),
        ({"presence_penalty": 0.1}, "penalties"),
        ({"structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ):
        assert reason in (SamplingParams(**options).why_no_drafts or "")
    with pytest.raises(ValueError, match="speculation must be true or false"):
        SamplingParams(speculation=1)  # type: ignore[arg-type]
