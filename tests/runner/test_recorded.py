"""Decode steps that are recorded on a CPU, and done again in one call, equal those that run operation by operation."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nemo_engine import Engine, SamplingParams
from nemo_engine.ops.cpu import packed
from nemo_engine.ops.op import compiled_for_cpu
from nemo_engine.runner.recorded import RecordedDecodes, _Recording
from nemo_engine.runner.runner import Runner
from nemo_engine.step import TOKEN_NOT_DRAFTED, PrefillRow, SlotFill, StepPlan
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf
from tests.helpers.speculating import choose_widths

pytestmark = pytest.mark.skipif(compiled_for_cpu() is None, reason="nemo_engine._cpu is not built")

OPTIONS: dict[str, Any] = {
    "device": "cpu", "dtype": "bfloat16", "page_size": 16, "num_kv_pages": 36, "max_model_len": 256,
    "skip_tokenizer_init": True,
}  # fmt: skip


@pytest.fixture(autouse=True)
def products_of_csrc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "_has_matrix_units", lambda: False)


def runner_of(engine: Engine) -> Runner:
    runner = engine._core.runner
    assert isinstance(runner, Runner)
    return runner


def params(index: int) -> SamplingParams:
    """Everything that the host does with logits, and lengths that end at different steps."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"temperature": 0.9, "seed": index}, {"temperature": 0.0, "logprobs": 3},
        {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "seed": 5}, {"temperature": 0.0, "logit_bias": {7: 4.0}},
        {"temperature": 0.0, "allowed_token_ids": [5, 6, 7, 8]},
    ]  # fmt: skip
    return SamplingParams(max_tokens=5 + 4 * index, ignore_eos=True, detokenize=False, **kinds[index % len(kinds)])


def count_rows(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The list that gets how many rows each recorded step computes, all of different tokens."""
    counts: list[int] = []
    replay = RecordedDecodes._replay

    def counted(self: RecordedDecodes, num_rows: int, ahead: Sequence[int], *recordings: _Recording) -> None:
        counts.append(num_rows)
        slots = self.words[:num_rows].tolist()
        assert len({*zip(slots, ahead or [0] * num_rows, strict=True)}) == num_rows, "a row repeats another"
        replay(self, num_rows, ahead, *recordings)

    monkeypatch.setattr(RecordedDecodes, "_replay", counted)
    return counts


def test_recorded_steps_give_the_bits_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any number of rows, with pages that are added and requests that are preempted and come back."""
    counts = count_rows(monkeypatch)
    prompts = [{"prompt_token_ids": [(31 * i + 7 * j) % 6000 + 3 for j in range(3 + 11 * i)]} for i in range(9)]
    found = []
    for enforce_eager in (False, True):
        with Engine("nemo-tiny", max_num_seqs=9, enforce_eager=enforce_eager, **OPTIONS) as engine:
            assert (runner_of(engine)._recorded is None) == enforce_eager
            outputs = engine.generate(prompts, [params(i) for i in range(len(prompts))])
            found.append([(out.outputs[0].token_ids, out.outputs[0].logprobs) for out in outputs])
    assert found[0] == found[1]
    assert len(counts) > 30 and {1, 2, 3, 4, 7} <= set(counts)


def test_each_kind_of_request_alone_is_recorded_with_the_bits_of_others() -> None:
    """A step is one call to the next tokens only where every row wants no more than a draw."""
    prompts = [{"prompt_token_ids": [3 + i, 9, 9, 4]} for i in range(7)]
    found = []
    for enforce_eager in (False, True):
        with Engine("nemo-tiny", max_num_seqs=1, enforce_eager=enforce_eager, **OPTIONS) as engine:
            outputs = engine.generate(prompts, [params(i) for i in range(len(prompts))])
            found.append([(out.outputs[0].token_ids, out.outputs[0].logprobs) for out in outputs])
    assert found[0] == found[1]


def test_recorded_wide_steps_give_the_bits_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any width, one after the other, with narrow ones between them and pages that begin inside a run."""
    counts = count_rows(monkeypatch)
    prompts = [{"prompt_token_ids": [(31 * i + j % 5) % 6000 + 3 for j in range(3 + 11 * i)]} for i in range(9)]
    config = {"method": "ngram", "num_speculative_tokens": 7}
    found, accepted = [], []
    for enforce_eager in (False, True):
        with Engine(
            "nemo-tiny", max_num_seqs=9, enforce_eager=enforce_eager, speculative_config=config, **OPTIONS
        ) as engine:
            choose_widths(engine._core.scheduler, random.Random(3))
            outputs = engine.generate(prompts, [params(i) for i in range(len(prompts))])
            found.append([(out.outputs[0].token_ids, out.outputs[0].logprobs) for out in outputs])
            accepted.append(engine.stats().num_spec_accepted_tokens_per_pos)
    assert found[0] == found[1] and accepted[0] == accepted[1] and sum(accepted[0]) > 20, accepted
    assert max(counts) > 9 and sum(counts) > 150


def test_drafts_of_a_request_that_enters_in_its_first_wide_step_follow_from_its_own_text() -> None:
    """The text comes with the upload of the step, so the recorded way, which looks for drafts before, does not serve."""
    ids = [5, 6, 7, 8, 9] * 3
    config = {"method": "ngram", "num_speculative_tokens": 3}
    greedy = SamplingParams(temperature=0.0)

    def fill(slot: int, num_computed: int, draft_until: int) -> SlotFill:
        return SlotFill(slot, ids, len(ids), num_computed, (1, 2), greedy, 0, draft_until=draft_until)

    results = []
    for enforce_eager in (False, True):
        with Engine("nemo-tiny", enforce_eager=enforce_eager, speculative_config=config, **OPTIONS) as engine:
            runner = runner_of(engine)
            prompt = PrefillRow(2, 0, len(ids), samples=True)
            runner.launch(StepPlan(1, (), (prompt,), fills=(fill(2, 0, 0),))).result()
            plan = StepPlan(2, (1,), fills=(fill(1, len(ids) - 1, 30),), width=4)
            results.append(runner.launch(plan).result().token_ids)
    assert results[0] == results[1] and TOKEN_NOT_DRAFTED not in results[0], results


def test_larger_batches_run_one_operation_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemo_engine.runner.runner.MAX_ROWS", 3)
    prompts = [{"prompt_token_ids": [5, 9 + i]} for i in range(5)]
    with Engine("nemo-tiny", max_num_seqs=5, **OPTIONS) as engine:
        recorded = runner_of(engine)._recorded
        assert recorded is not None and recorded.size == 3
        greedy = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, detokenize=False)
        together = [out.outputs[0].token_ids for out in engine.generate(prompts, greedy)]
        engine.reset_prefix_cache()
        assert together == [engine.generate(prompt, greedy)[0].outputs[0].token_ids for prompt in prompts]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float32"}, "linear is semantics"),
        ({"kv_cache_dtype": "fp8"}, "paged_attention is torch"),
        ({"prefer": {"linear": "semantics"}}, "linear is semantics"),
        ({"quantization": "fp8"}, "a weight is not packed"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_is_not_recorded_says_why(change: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "nemo_engine"), Engine("nemo-tiny", **{**OPTIONS, **change}) as engine:
        assert runner_of(engine)._recorded is None
        assert len(engine.generate({"prompt_token_ids": [5, 6]}, params(0))[0].outputs[0].token_ids) == 5
    said = next(r.getMessage() for r in caplog.records if "decode steps are not recorded" in r.getMessage())
    assert reason in said, said


def test_a_head_that_is_the_embeddings_is_not_recorded(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    config = tiny_config(tie_word_embeddings=True)
    write_hf(tmp_path, config, random_state_dict(config, seed=1))
    with caplog.at_level("INFO", "nemo_engine"), Engine(tmp_path, **OPTIONS) as engine:
        assert runner_of(engine)._recorded is None
        assert len(engine.generate({"prompt_token_ids": [5, 6]}, params(0))[0].outputs[0].token_ids) == 5
    assert any("a weight is not packed" in record.getMessage() for record in caplog.records)


def test_what_torch_computes_while_recording_is_refused() -> None:
    x = torch.arange(6).view(2, 3)
    with torch.inference_mode(), _Recording() as mode:
        made = torch.empty_like(x)
        assert x[1:].flatten().unflatten(0, (3, 1)).split([1, 2])[0].shape == (1, 1)
        assert [memory.data_ptr() for memory in mode.memory] == [made.data_ptr()]
        for compute in (lambda: x + 1, lambda: x[torch.tensor([0])], lambda: made.zero_(), lambda: x.float()):
            with pytest.raises(RuntimeError, match="computes in a step that is being recorded"):
                compute()
