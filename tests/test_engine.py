"""The public face: what goes in, what comes out, what is refused and with which words."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nemo_engine.engine.engine import Engine
from nemo_engine.outputs import RequestOutput
from nemo_engine.sampling_params import RepetitionDetection, RequestOutputKind, SamplingParams
from nemo_engine.step import StepPlan, TokenLogprobs
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf

VOCAB = 97


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with no tokenizer."""
    path = tmp_path_factory.mktemp("tiny")
    config = tiny_config(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=24, vocab_size=VOCAB)
    write_hf(path, config, random_state_dict(config, seed=1, dtype=torch.float32))
    return path


def small_engine(model: Path | str, **options: Any) -> Engine:
    defaults: dict[str, Any] = {
        "device": "cpu", "dtype": "float32", "page_size": 16, "num_kv_pages": 40, "max_num_seqs": 8,
        "max_num_batched_tokens": 64, "max_model_len": 256,
    }  # fmt: skip
    return Engine(model, **(defaults | options))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with small_engine(model) as engine:
        yield engine


@pytest.fixture(scope="module")
def text_engine() -> Iterator[Engine]:
    with small_engine("nemo-tiny", max_model_len=512, num_kv_pages=64) as engine:
        yield engine


def ids(*token_ids: int) -> dict[str, list[int]]:
    return {"prompt_token_ids": list(token_ids)}


GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


# ---- generate


def test_one_prompt_or_a_list_in_order(engine: Engine) -> None:
    prompts = [ids(1, 2, 3), ids(4), ids(5, 6)]
    outputs = engine.generate(prompts, [GREEDY, SamplingParams(max_tokens=1), GREEDY])
    assert [o.prompt_token_ids for o in outputs] == [[1, 2, 3], [4], [5, 6]]
    assert [len(o.outputs[0].token_ids) for o in outputs] == [6, 1, 6]
    assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)
    assert engine.generate(ids(5, 6), GREEDY)[0].outputs[0].token_ids == outputs[2].outputs[0].token_ids
    assert engine.generate([]) == []


def test_default_is_sixteen_sampled_tokens_that_the_seed_of_the_engine_fixes(model: Path) -> None:
    results = []
    for seed in (0, 0, 1):
        with small_engine(model, seed=seed) as engine:
            (output,) = engine.generate(ids(1, 2, 3))
            results.append(output.outputs[0].token_ids)
            assert output.sampling_params is not None
            assert (output.sampling_params.temperature, output.sampling_params.max_tokens) == (1.0, 16)
    assert len(results[0]) == 16 and results[0] == results[1] != results[2]


def test_metrics_are_in_order_and_cached_tokens_are_counted(model: Path) -> None:
    with small_engine(model) as engine:
        prompt = ids(*[(3 * i) % VOCAB for i in range(40)])
        first, second = (engine.generate(prompt, GREEDY)[0] for _ in range(2))
        assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
        assert first.outputs[0].token_ids == second.outputs[0].token_ids
        engine.reset_prefix_cache()
        assert engine.generate(prompt, GREEDY)[0].num_cached_tokens == 0
        m = first.metrics
        assert m is not None and m.queued_ts and m.scheduled_ts and m.first_token_ts and m.last_token_ts
        assert m.arrival_time <= m.queued_ts <= m.scheduled_ts <= m.first_token_ts <= m.last_token_ts
        assert m.num_generation_tokens == 6 and m.num_preemptions == 0


def test_stop_token_id_ends_and_stays(engine: Engine) -> None:
    tokens = engine.generate(ids(1, 2, 3), GREEDY)[0].outputs[0].token_ids
    stop = tokens[2]
    (output,) = engine.generate(
        ids(1, 2, 3), SamplingParams(temperature=0.0, max_tokens=6, stop_token_ids=[stop], ignore_eos=True)
    )
    end = tokens.index(stop) + 1
    assert output.outputs[0].token_ids == tokens[:end]
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)


def test_logprobs(engine: Engine) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    (output,) = engine.generate(ids(9, 8, 7, 6), params)
    completion = output.outputs[0]
    assert completion.logprobs is not None and len(completion.logprobs) == 3
    total = 0.0
    for token_id, entry in zip(completion.token_ids, completion.logprobs):
        assert entry[token_id].rank == 1 and len(entry) == 2
        assert entry[token_id].logprob == max(e.logprob for e in entry.values())
        total += entry[token_id].logprob
    assert completion.cumulative_logprob == pytest.approx(total)
    assert output.prompt_logprobs is not None and output.prompt_logprobs[0] is None
    for token_id, prompt_entry in zip([8, 7, 6], output.prompt_logprobs[1:]):
        assert prompt_entry is not None and token_id in prompt_entry and 1 <= len(prompt_entry) <= 2
    assert engine.generate(ids(9), GREEDY)[0].outputs[0].logprobs is None


def test_a_looping_output_is_ended(engine: Engine) -> None:
    params = SamplingParams(
        temperature=0.0, max_tokens=50, allowed_token_ids=[5], repetition_detection=RepetitionDetection(3, 1, 4)
    )
    (output,) = engine.generate(ids(1), params)
    assert output.outputs[0].token_ids == [5] * 4
    assert output.outputs[0].finish_reason == "repetition"


def test_two_threads_share_the_engine(engine: Engine) -> None:
    expected = {n: engine.generate(ids(n, n + 1), GREEDY)[0].outputs[0].token_ids for n in range(6)}
    results: dict[int, list[int]] = {}

    def work(n: int) -> None:
        results[n] = engine.generate(ids(n, n + 1), GREEDY)[0].outputs[0].token_ids

    threads = [threading.Thread(target=work, args=(n,)) for n in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert results == expected


# ---- step by step


def collect(engine: Engine) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


def test_output_kinds(engine: Engine) -> None:
    for kind in RequestOutputKind:
        engine.add_request(
            kind.name, ids(3, 4), SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True, output_kind=kind)
        )
    engine.add_request(
        "every 2", ids(3, 4), SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True,
        output_kind=RequestOutputKind.DELTA, stream_interval=2),
    )  # fmt: skip
    outputs = collect(engine)
    sizes = {name: [len(o.outputs[0].token_ids) for o in seen] for name, seen in outputs.items()}
    assert sizes == {"CUMULATIVE": [1, 2, 3, 4, 5], "DELTA": [1] * 5, "FINAL_ONLY": [5], "every 2": [1, 2, 2]}
    finals = {tuple(t for o in seen for t in o.outputs[0].token_ids)[-5:] for seen in outputs.values()}
    assert len(finals) == 1
    assert all([o.finished for o in seen] == [False] * (len(seen) - 1) + [True] for seen in outputs.values())


def test_generate_does_not_swallow_the_outputs_of_added_requests(engine: Engine) -> None:
    engine.add_request("mine", ids(3, 4), GREEDY)
    (output,) = engine.generate(ids(7), SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True))
    assert len(output.outputs[0].token_ids) == 12
    outputs = collect(engine)
    assert [len(o.outputs[0].token_ids) for o in outputs["mine"]] == [1, 2, 3, 4, 5, 6]
    assert set(outputs) == {"mine"}


def test_abort_reports_what_there_was_and_frees_everything(engine: Engine) -> None:
    engine.add_request("a", ids(3, 4), SamplingParams(max_tokens=100, ignore_eos=True))
    engine.add_request("b", ids(3, 4), GREEDY)
    for _ in range(3):
        engine.step()
    engine.abort("a")
    engine.abort(["a", "never heard of"])
    outputs = collect(engine)
    (last,) = outputs["a"]
    assert last.finished and last.outputs[0].finish_reason == "abort" and len(last.outputs[0].token_ids) == 3
    assert outputs["b"][-1].outputs[0].finish_reason == "length"
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_free_pages) == (0, 0, stats.num_pages)


def test_a_dropped_stream_aborts(engine: Engine) -> None:
    stream = engine.stream([ids(1), ids(2)], SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    assert engine.stats().num_running == 2
    stream.close()
    assert engine.stats().num_running == 0 and not engine.has_unfinished_requests()
    engine.stream(ids(1))  # never started: nothing is queued
    assert engine.stats().num_waiting == 0


def test_priority(model: Path) -> None:
    with small_engine(model, max_num_seqs=1, max_num_batched_tokens=64, scheduling_policy="priority") as engine:
        for name, priority in (("low", 5), ("high", -1), ("middle", 2)):
            engine.add_request(name, ids(1, 2), GREEDY, priority=priority)
        finished = []
        while engine.has_unfinished_requests():
            finished += [o.request_id for o in engine.step() if o.finished]
        assert finished == ["high", "middle", "low"]


# ---- text


def test_streamed_text_equals_final_text(text_engine: Engine) -> None:
    prompts = ["The function returns", "日本語 and 🎉", "import os"]
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=40, skip_special_tokens=False)
    finals = text_engine.generate(prompts, params)
    texts = dict.fromkeys(["0", "1", "2"], "")
    tokens: dict[str, list[int]] = {key: [] for key in texts}
    for output in text_engine.stream(prompts, params):
        for completion in output.outputs:
            texts[output.request_id] += completion.text
            tokens[output.request_id] += completion.token_ids
    assert list(texts.values()) == [o.outputs[0].text for o in finals]
    assert list(tokens.values()) == [o.outputs[0].token_ids for o in finals]
    assert all(o.prompt == prompt and o.prompt_token_ids[0] == 1 for o, prompt in zip(finals, prompts))
    assert text_engine.tokenizer is not None
    for output in finals:
        completion = output.outputs[0]
        if completion.finish_reason == "length":
            assert completion.text == text_engine.tokenizer.decode(completion.token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("keep", [False, True])
def test_stop_string(text_engine: Engine, keep: bool) -> None:
    (whole,) = text_engine.generate("The function returns", SamplingParams(temperature=0.0, max_tokens=30))
    text = whole.outputs[0].text
    stop = text[10:14]
    params = SamplingParams(temperature=0.0, max_tokens=30, stop=stop, include_stop_str_in_output=keep)
    (output,) = text_engine.generate("The function returns", params)
    completion = output.outputs[0]
    assert completion.text == text[: text.index(stop) + (len(stop) if keep else 0)]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)
    assert completion.token_ids == whole.outputs[0].token_ids[: len(completion.token_ids)]
    streamed = "".join(o.outputs[0].text for o in text_engine.stream("The function returns", params) if o.outputs)
    assert streamed == completion.text
    assert text_engine.stats().num_running == 0


def test_chat_defaults(text_engine: Engine) -> None:
    messages = [{"role": "user", "content": "What is a list?"}]
    (output,) = text_engine.chat(messages, SamplingParams(max_tokens=8))
    assert output.sampling_params is not None and output.sampling_params.temperature == 0.3
    assert output.prompt_token_ids[:2] == [1, 3] and output.prompt_token_ids[-1] == 4
    (explicit,) = text_engine.chat(messages, SamplingParams(temperature=1.0, max_tokens=8))
    assert explicit.sampling_params is not None and explicit.sampling_params.temperature == 1.0
    many = text_engine.chat([messages, messages], SamplingParams(temperature=0.0, max_tokens=8))
    assert len(many) == 2 and many[0].outputs[0].token_ids == many[1].outputs[0].token_ids
    streamed = "".join(
        o.outputs[0].text for o in text_engine.stream_chat(messages, SamplingParams(temperature=0.0, max_tokens=8))
    )
    assert streamed == many[0].outputs[0].text


# ---- what is refused


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("text", {}, "no tokenizer"),
        ({"prompt_token_ids": []}, {}, "must not be empty"),
        ({"prompt_token_ids": [1, VOCAB]}, {}, r"\[1\] must be in \[0, 96\], got 97"),
        ({"prompt_token_ids": [-1]}, {}, r"must be in \[0, 96\], got -1"),
        ({"prompt_token_ids": [1.5]}, {}, r"\[0\] must be an integer, got 1.5"),
        ({"prompt_token_ids": [True]}, {}, "must be an integer"),
        ({"prompt_token_ids": "12"}, {}, "must be a list of token ids"),
        ({"token_ids": [1]}, {}, "unknown keys"),
        ({}, {}, "needs prompt"),
        (17, {}, "prompts must be"),
        ([[1] * 10_000], {}, "must be a string, "),
        ({"prompt_token_ids": "1" * 10_000}, {}, "must be a list of token ids"),
        (ids(1), {"stop": "x"}, "stop needs a tokenizer"),
        (ids(1), {"bad_words": ["x"]}, "bad_words needs a tokenizer"),
        (ids(1), {"logprobs": 21}, r"logprobs must be at most max_logprobs \(20\), got 21"),
        (ids(1), {"prompt_logprobs": -1}, r"prompt_logprobs must be at most max_logprobs \(20\), got -1"),
        (ids(1), {"stop_token_ids": [VOCAB]}, r"stop_token_ids must hold ids in \[0, 96\], got 97"),
        (ids(1), {"allowed_token_ids": [500]}, "allowed_token_ids must hold ids"),
        (ids(1), {"logit_bias": {97: 1.0}}, "logit_bias must hold ids"),
        (
            ids(*range(90), *range(90), *range(77)),
            {"max_tokens": 1},
            "257 tokens .* 258 tokens: more than max_model_len 256",
        ),
        (ids(1, 2), {"max_tokens": 255}, "2 tokens and max_tokens 255 make 257 tokens: more than max_model_len 256"),
        (ids(*([1] * 256)), {"max_tokens": None}, "256 tokens and at least 1 output token make 257"),
    ],
)
def test_bad_requests(engine: Engine, prompt: Any, params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        engine.generate(prompt, SamplingParams(**params))
    assert len(str(refused.value)) < 500
    assert not engine.has_unfinished_requests() and engine.stats().num_waiting == 0
    assert len(engine.generate(ids(1), GREEDY)[0].outputs[0].token_ids) == 6


def test_one_bad_prompt_of_many_is_named_and_nothing_is_queued(engine: Engine) -> None:
    with pytest.raises(ValueError, match=r"prompts\[1\]"):
        engine.generate([ids(1), ids(999)], GREEDY)
    with pytest.raises(ValueError, match=r"prompts\[1\]: .*max_model_len 256"):
        engine.generate([ids(1), ids(*([1] * 300))], GREEDY)
    with pytest.raises(ValueError, match=r"one per prompt \(2\), got 3"):
        engine.generate([ids(1), ids(2)], [GREEDY] * 3)
    assert engine.stats().num_waiting == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"max_seqs": 4}, ValueError, "max_seqs.: did you mean max_num_seqs"),
        ({"page_size": 48}, ValueError, "page_size"),
        ({"num_kv_pages": 0}, ValueError, "num_kv_pages"),
        ({"max_num_batched_tokens": 4}, ValueError, "max_num_batched_tokens"),
        ({"prefer": {"rms_norm": "no such thing"}}, ValueError, "no such thing"),
        ({"prefer": {"no_such_op": "triton"}}, ValueError, "no_such_op"),
        ({"kv_cache_dtype": "fp4"}, ValueError, "kv_cache_dtype"),
        ({"device": "tpu"}, ValueError, "device"),
        ({"max_model_len": 10**7}, ValueError, "10000000"),
        ({"num_kv_pages": 4, "max_model_len": 65}, ValueError, "max_model_len 65 does not fit: .* hold 64"),
    ],
)
def test_bad_options(model: Path, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        small_engine(model, **options)


def test_unknown_model() -> None:
    with pytest.raises((ValueError, FileNotFoundError), match="/no/such/model"):
        Engine("/no/such/model")


def test_duplicate_and_odd_request_ids(engine: Engine) -> None:
    engine.add_request("same", ids(1), GREEDY)
    with pytest.raises(ValueError, match="'same' is in use"):
        engine.add_request("same", ids(1), GREEDY)
    for bad in ("", 3, None):
        with pytest.raises(ValueError, match="request_id must be a non-empty string"):
            engine.add_request(bad, ids(1), GREEDY)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scheduling_policy"):
        engine.add_request("other", ids(1), GREEDY, priority=1)
    assert set(collect(engine)) == {"same"}


# ---- limits, failures, end of life


def test_auto_context_is_what_the_cache_holds_and_is_usable_to_the_last_token(model: Path) -> None:
    with small_engine(model, num_kv_pages=3, max_model_len="auto") as engine:
        assert engine.max_model_len == 48
        (output,) = engine.generate(ids(*([1] * 40)), SamplingParams(max_tokens=None, ignore_eos=True))
        assert len(output.outputs[0].token_ids) == 8
        with pytest.raises(ValueError, match="more than max_model_len 48"):
            engine.generate(ids(*([1] * 40)), SamplingParams(max_tokens=9))


def test_the_smallest_cache(model: Path) -> None:
    options = {"num_kv_pages": 1, "max_model_len": "auto", "max_num_seqs": 1, "max_num_batched_tokens": 1}
    with small_engine(model, **options) as engine:
        outputs = engine.generate([ids(1, 2, 3), ids(4)], SamplingParams(max_tokens=13, ignore_eos=True))
        assert [len(o.outputs[0].token_ids) for o in outputs] == [13, 13]


def test_nan_weights_fail_the_request_that_meets_them_and_no_other(tmp_path: Path) -> None:
    config = tiny_config(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, hidden_size=24, vocab_size=VOCAB)
    state = random_state_dict(config, seed=1, dtype=torch.float32)
    state["model.embed_tokens.weight"][13] = float("nan")
    write_hf(tmp_path, config, state)
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True, allowed_token_ids=[1, 2, 3])
    with small_engine(tmp_path) as engine:
        prompt = [5] * 20
        expected = engine.generate(ids(*prompt), params)[0].outputs[0].token_ids
        bad, good = engine.generate([ids(*([13] * 20)), ids(*prompt)], params)
        assert bad.outputs[0].finish_reason == "error" and bad.outputs[0].token_ids == []
        assert "not finite" in (bad.outputs[0].error or "")
        assert good.outputs[0].finish_reason == "length" and good.outputs[0].token_ids == expected
        # Pages that held NaN are used again and must not spoil anybody.
        for _ in range(30):
            assert engine.generate(ids(*prompt, 6), params)[0].outputs[0].finish_reason == "length"
            engine.reset_prefix_cache()


def test_log_probabilities_of_a_prompt_that_are_not_finite_fail_their_request(model: Path) -> None:
    """Also in a chunk from which nothing is sampled, so that no token shows it; what it computed cannot be found."""
    with small_engine(model, max_num_batched_tokens=8) as engine:
        launch, chunks = engine._core.runner.launch, []

        def spoilt(plan: StepPlan) -> Any:
            result = launch(plan).result()
            bad = {
                index: [TokenLogprobs([token], [float("nan")], [1]) for token in range(len(entries))]
                for index, entries in result.prompt_logprobs.items()
            }
            chunks.extend(bad)
            return SimpleNamespace(result=lambda: replace(result, prompt_logprobs=bad))

        expected = engine.generate(ids(*range(5)), GREEDY)[0].outputs[0].token_ids
        engine._core.runner.launch = spoilt  # type: ignore[method-assign]
        prompts = [ids(*range(1, 41)), ids(*range(5))]
        bad, good = engine.generate(prompts, [SamplingParams(max_tokens=3, prompt_logprobs=0), GREEDY])
        assert bad.outputs[0].finish_reason == "error" and "not finite" in (bad.outputs[0].error or "")
        assert len(chunks) == 1 and good.outputs[0].token_ids == expected
        engine._core.runner.launch = launch  # type: ignore[method-assign]
        assert engine.generate(prompts[0], GREEDY)[0].num_cached_tokens == 0


def test_masks_that_leave_nothing_fail_that_request(engine: Engine) -> None:
    impossible = SamplingParams(max_tokens=5, min_tokens=2, allowed_token_ids=[7], stop_token_ids=[7])
    bad, good = engine.generate([ids(1), ids(1)], [impossible, GREEDY])
    assert bad.outputs[0].finish_reason == "error" and "leave no token" in (bad.outputs[0].error or "")
    assert good.outputs[0].finish_reason == "length"


def test_a_broken_step_ends_its_requests_and_the_engine_lives_on(model: Path) -> None:
    with small_engine(model) as engine:
        expected = engine.generate(ids(*range(40)), GREEDY)[0].outputs[0].token_ids
        launch, calls = engine._core.runner.launch, []

        def breaks_once(plan: Any) -> Any:
            calls.append(plan)
            if len(calls) == 2:
                raise MemoryError("no room")
            return launch(plan)

        engine._core.runner.launch = breaks_once  # type: ignore[method-assign]
        (output,) = engine.generate(ids(*range(40)), GREEDY)
        assert output.outputs[0].finish_reason == "error"
        assert output.outputs[0].error == "the step failed: MemoryError: no room"
        assert engine.generate(ids(*range(40)), GREEDY)[0].outputs[0].token_ids == expected

        def interrupted(plan: Any) -> Any:
            raise KeyboardInterrupt

        engine._core.runner.launch = interrupted  # type: ignore[method-assign]
        with pytest.raises(KeyboardInterrupt):
            engine.generate(ids(*range(40)), GREEDY)
        engine._core.runner.launch = launch  # type: ignore[method-assign]
        assert engine.generate(ids(*range(40)), GREEDY)[0].outputs[0].token_ids == expected
        stats = engine.stats()
        assert (stats.num_running, stats.num_free_pages) == (0, stats.num_pages)


def test_close_is_final_and_returns_memory(model: Path) -> None:
    def live_bytes() -> int:
        gc.collect()
        return sum(o.untyped_storage().nbytes() for o in gc.get_objects() if type(o) is torch.Tensor)

    before = live_bytes()
    for _ in range(3):
        engine = small_engine(model, num_kv_pages=100)
        engine.generate(ids(1), GREEDY)
        assert live_bytes() > before + 100 * 16 * 8
        engine.close()
        engine.close()
        assert live_bytes() <= before
        with pytest.raises(RuntimeError, match="closed"):
            engine.generate(ids(1), GREEDY)
        with pytest.raises(RuntimeError, match="closed"):
            engine.step()


def test_a_chat_without_parameters_is_cut_to_the_context(text_engine: Engine) -> None:
    message = [{"role": "user", "content": "hi"}]
    (answer,) = text_engine.chat(message)
    assert answer.sampling_params is not None and answer.sampling_params.max_tokens == 512 - len(
        answer.prompt_token_ids
    )
    assert answer.sampling_params.temperature == 0.3
    with pytest.raises(ValueError, match="more than max_model_len 512"):
        text_engine.chat(message, SamplingParams(max_tokens=1024))
