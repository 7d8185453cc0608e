"""What must not change a request's tokens: its neighbours, chunking, preemption, caching, overlap, aborts.

A tiny random model in fp64 on the CPU, random workloads, greedy and seeded, compared token for token with each request
run alone. ``invariants.check`` runs after every step.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_engine.engine.engine import Engine
from nemo_engine.outputs import RequestOutput
from nemo_engine.sampling_params import SamplingParams
from tests.helpers.checked import check_every_step
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf

PAGE = 16
Prompts = list[list[int]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    config = tiny_config(num_layers=3, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=24, vocab_size=97)
    write_hf(path, config, random_state_dict(config, seed=1, dtype=torch.float32))
    return path


def make_engine(model: Path, **options: Any) -> Engine:
    defaults: dict[str, Any] = {
        "dtype": "float64", "device": "cpu", "page_size": PAGE, "num_kv_pages": 64, "max_num_seqs": 8,
        "max_num_batched_tokens": 256, "max_model_len": 256, "max_logprobs": 5,
    }  # fmt: skip
    return check_every_step(Engine(model, **(defaults | options)))


def make_workload(seed: int, count: int = 10) -> tuple[Prompts, list[SamplingParams]]:
    """Prompts around page boundaries, many with common prefixes; greedy and seeded, with assorted parameters."""
    rng = random.Random(seed)
    stem = [rng.randrange(97) for _ in range(5 * PAGE)]
    prompts, params = [], []
    for index in range(count):
        length = rng.choice(
            [1, 2, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE, 3 * PAGE + 1, 4 * PAGE - 1, rng.randrange(1, 80)]
        )
        shared = rng.choice([0, length // 2, length])
        prompts.append(stem[:shared] + [rng.randrange(97) for _ in range(length - shared)])
        common: dict[str, Any] = {
            "max_tokens": rng.choice([1, 2, PAGE, 3 * PAGE - length % PAGE, rng.randrange(1, 50)])
        }
        if rng.random() < 0.4:
            common["stop_token_ids"] = rng.sample(range(97), 2)
        if rng.random() < 0.3:
            common |= {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.2}
        if index % 2:
            common |= {"temperature": rng.choice([0.7, 1.0, 1.5]), "seed": rng.randrange(2**64)}
            common |= rng.choice([{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05, "top_k": 20, "top_p": 0.9}])
        else:
            common |= {"temperature": 0.0}
        params.append(SamplingParams(**common, ignore_eos=rng.random() < 0.5))
    return prompts, params


def summary(outputs: list[RequestOutput]) -> list[tuple[Any, ...]]:
    return [(o.outputs[0].token_ids, o.outputs[0].finish_reason, o.outputs[0].stop_reason) for o in outputs]


def run(engine: Engine, prompts: Prompts, params: list[SamplingParams]) -> list[tuple[Any, ...]]:
    return summary(engine.generate([{"prompt_token_ids": ids} for ids in prompts], params))


def assert_all_returned(engine: Engine) -> None:
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_pages) == (0, 0, stats.num_pages)


@pytest.fixture(scope="module")
def alone(model: Path) -> Iterator[Any]:
    """Runs each request alone, whole prefill, no caching."""
    with make_engine(model, enable_prefix_caching=False, max_num_seqs=1) as engine:
        cache: dict[int, list[tuple[Any, ...]]] = {}

        def expected(seed: int) -> list[tuple[Any, ...]]:
            if seed not in cache:
                prompts, params = make_workload(seed)
                cache[seed] = [run(engine, [ids], [own])[0] for ids, own in zip(prompts, params)]
            return cache[seed]

        yield expected


VARIANTS: dict[str, dict[str, Any]] = {
    "batched": {"enable_prefix_caching": False},
    "prefix caching": {},
    "chunked": {"enable_prefix_caching": False, "max_num_batched_tokens": 11},
    "chunked by one token": {"max_num_batched_tokens": 8, "max_num_seqs": 8},
    "preempted": {"num_kv_pages": 8, "max_model_len": 128},
    "preempted, no caching": {"num_kv_pages": 8, "max_model_len": 128, "enable_prefix_caching": False},
    "overlapped": {"pipeline_depth": 2},
    "overlapped, chunked, preempted": {
        "pipeline_depth": 2, "max_num_batched_tokens": 19, "num_kv_pages": 9, "max_model_len": 128,
    },
    "large pages": {"page_size": 128, "num_kv_pages": 16},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(4))
def test_tokens_do_not_depend_on(model: Path, alone: Any, variant: str, seed: int) -> None:
    prompts, params = make_workload(seed)
    with make_engine(model, **VARIANTS[variant]) as engine:
        assert run(engine, prompts, params) == alone(seed)
        assert_all_returned(engine)
        assert run(engine, prompts, params) == alone(seed), "a second time, from a warm cache"
        stats = engine.stats()
        if variant == "prefix caching":
            assert stats.total_prefix_hit_tokens > 0
        if not engine.config.enable_prefix_caching:
            assert stats.total_prefix_hit_tokens == 0


@pytest.mark.parametrize(
    "options", [{}, {"pipeline_depth": 2}, {"enable_prefix_caching": False}, {"max_num_batched_tokens": 9}]
)
def test_tokens_do_not_depend_on_preemption(model: Path, options: dict[str, Any]) -> None:
    """Eight short prompts with long outputs over a cache that holds two of them at full length."""
    prompts = [[(3 * i + j) % 97 for j in range(1 + 2 * i)] for i in range(8)]
    params = [SamplingParams(max_tokens=60 - i, ignore_eos=True, seed=i, temperature=i % 2) for i in range(8)]
    with make_engine(model, enable_prefix_caching=False, max_num_seqs=1) as engine:
        expected = [run(engine, [ids], [own])[0] for ids, own in zip(prompts, params)]
    with make_engine(model, **({"num_kv_pages": 9, "max_model_len": 128} | options)) as engine:
        assert run(engine, prompts, params) == expected
        assert engine.stats().total_preemptions > 3
        assert_all_returned(engine)


@pytest.mark.parametrize("depth", [1, 2])
def test_tokens_do_not_depend_on_aborted_neighbours(model: Path, alone: Any, depth: int) -> None:
    rng = random.Random(5)
    prompts, params = make_workload(3)
    with make_engine(model, pipeline_depth=depth, num_kv_pages=16, max_model_len=128) as engine:
        for index, (ids, own) in enumerate(zip(prompts, params)):
            engine.add_request(f"keep{index}", {"prompt_token_ids": ids}, own)
            engine.add_request(
                f"drop{index}", {"prompt_token_ids": ids[: 1 + index] * 2}, SamplingParams(max_tokens=40)
            )
        final: dict[str, RequestOutput] = {}
        doomed = [f"drop{index}" for index in range(len(prompts))]
        while engine.has_unfinished_requests():
            if doomed and rng.random() < 0.3:
                engine.abort(doomed.pop(rng.randrange(len(doomed))))
            for output in engine.step():
                if output.finished:
                    final[output.request_id] = output
        assert summary([final[f"keep{index}"] for index in range(len(prompts))]) == alone(3)
        assert any(final[f"drop{i}"].outputs[0].finish_reason == "abort" for i in range(len(prompts)))
        assert_all_returned(engine)


@pytest.mark.parametrize("caching", [True, False])
def test_siblings_share_the_prompt_and_equal_single_requests(model: Path, caching: bool) -> None:
    prompt = {"prompt_token_ids": [(7 * i) % 97 for i in range(5 * PAGE + 3)]}
    with make_engine(model, enable_prefix_caching=caching) as engine:
        (output,) = engine.generate(prompt, SamplingParams(n=4, seed=11, max_tokens=20, ignore_eos=True))
        # Five full pages once, and per completion the rest of the prompt with 20 tokens.
        assert engine.stats().peak_used_pages == 5 + 4 * 2
        assert [completion.index for completion in output.outputs] == [0, 1, 2, 3]
        assert len({tuple(completion.token_ids) for completion in output.outputs}) > 1
        for index, completion in enumerate(output.outputs):
            (single,) = engine.generate(prompt, SamplingParams(seed=11 + index, max_tokens=20, ignore_eos=True))
            assert single.outputs[0].token_ids == completion.token_ids
        assert_all_returned(engine)


def test_prompt_logprobs_are_the_same_whole_and_chunked(model: Path) -> None:
    prompt = {"prompt_token_ids": [(5 * i + 1) % 97 for i in range(3 * PAGE + 5)]}
    params = SamplingParams(prompt_logprobs=2, logprobs=3, max_tokens=4, temperature=0.0, ignore_eos=True)
    results = []
    for options in ({}, {"max_num_batched_tokens": 8}, {"pipeline_depth": 2, "max_num_batched_tokens": 9}):
        with make_engine(model, **options) as engine:
            engine.generate(prompt, SamplingParams(max_tokens=1))  # its pages must not be read below
            (output,) = engine.generate(prompt, params)
            assert output.num_cached_tokens == 0
            results.append((output.prompt_logprobs, output.outputs[0].logprobs))
    first = results[0]
    assert first[0] is not None and first[0][0] is None and len(first[0]) == 3 * PAGE + 5
    assert first[1] is not None and len(first[1]) == 4
    for other in results[1:]:
        for ours, theirs in zip(first[0][1:] + first[1], other[0][1:] + other[1]):
            assert list(ours) == list(theirs)
            for token_id, entry in ours.items():
                assert entry.logprob == pytest.approx(theirs[token_id].logprob, abs=1e-5)
                assert entry.rank == theirs[token_id].rank


def test_tokens_do_not_depend_on_one_that_never_decodes(model: Path) -> None:
    """It prefills in the very step in which the decoding rows take a page, so that these look the same before and
    after.
    """
    ids = {"prompt_token_ids": [(7 * i) % 97 for i in range(PAGE + 4)]}
    params = SamplingParams(temperature=0.0, max_tokens=2 * PAGE, ignore_eos=True)
    with make_engine(model, enable_prefix_caching=False) as engine:
        (expected,) = engine.generate(ids, params)
        for arrival in range(PAGE - 6, PAGE - 1):
            for is_aborted in (False, True):
                engine.add_request("stays", ids, params)
                for _ in range(arrival):
                    engine.step()
                long = [3] * 250 if is_aborted else [3] * 10
                engine.add_request("goes", {"prompt_token_ids": long}, SamplingParams(max_tokens=1))
                outputs = engine.step()
                if is_aborted:
                    engine.abort("goes")
                while engine.has_unfinished_requests():
                    outputs += engine.step()
                (final,) = [output for output in outputs if output.request_id == "stays" and output.finished]
                assert final.outputs[0].token_ids == expected.outputs[0].token_ids, (arrival, is_aborted)
