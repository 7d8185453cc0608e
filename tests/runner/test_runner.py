"""The runner, driven by hand-made plans, against transformers and against itself."""

from __future__ import annotations

import itertools
import math
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_engine.checkpoint.checkpoint import open_checkpoint
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.ops import Ops, Site
from nemo_engine.runner import runner as runner_module
from nemo_engine.runner import step_compute
from nemo_engine.runner.runner import Runner
from nemo_engine.runner.sampler import Sampler
from nemo_engine.runner.step_rows import StepRows
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.step import TOKEN_ALL_MASKED, TOKEN_NOT_FINITE, PrefillRow, SlotFill, StepPlan, StepResult
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf

PAGE = 16
MAX_LEN = 160
NUM_SLOTS = 6
GREEDY = SamplingParams(temperature=0.0)
LOGITS: list[Tensor] = []  # what the runner's sampler was last given


class RecordingSampler(Sampler):
    def sample(self, logits: Tensor, *args: Any) -> Tensor:
        LOGITS[:] = [logits.clone()]
        return super().sample(logits, *args)


@pytest.fixture(autouse=True)
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(runner_module, "Sampler", RecordingSampler)
    yield
    LOGITS.clear()


def make_runner(path: Path, config: ModelConfig, dtype: torch.dtype = torch.float64, num_pages: int = 40) -> Runner:
    if not (path / "config.json").exists():
        write_hf(path, config, random_state_dict(config, seed=7))
    engine_config = EngineConfig(device="cpu", page_size=PAGE, max_num_seqs=NUM_SLOTS, max_num_batched_tokens=256)
    runner = Runner(
        config,
        engine_config,
        load_weights(open_checkpoint(path), config, dtype=dtype, progress=False),
        Ops.select(Site.of(config, PAGE, dtype, torch.device("cpu")), {}),
        num_pages=num_pages,
        max_model_len=MAX_LEN,
        device=torch.device("cpu"),
        kv_dtype=dtype,
    )
    runner._kv_cache.poison(torch.arange(num_pages + 1))
    return runner


def fill(
    slot: int, ids: Sequence[int], pages: Sequence[int], *, computed: int = 0, params: SamplingParams = GREEDY
) -> SlotFill:
    return SlotFill(slot, ids, len(ids), computed, pages, params, seed=slot)


def random_ids(count: int, seed: int = 0, vocab: int = 97) -> list[int]:
    return torch.randint(0, vocab, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(runner: Runner, plan: StepPlan) -> StepResult:
    return runner.launch(plan).result()


def decode(runner: Runner, slot: int, start: int, count: int, spare_pages: list[int]) -> tuple[list[int], list[Tensor]]:
    """``count`` decode steps of one slot whose position ``start`` is computed next."""
    tokens, logits = [], []
    slots = (slot,)
    for position in range(start, start + count):
        new_pages = ((slot, position // PAGE, spare_pages.pop(0)),) if position % PAGE == 0 else ()
        tokens += run(runner, StepPlan(position, slots, new_pages=new_pages)).token_ids
        logits.append(LOGITS[0][0])
    return tokens, logits


# ---- against transformers


@pytest.mark.parametrize("chunks", ["whole", "7", "16", "1"])
@pytest.mark.parametrize("length", [PAGE - 1, PAGE, PAGE + 1, 2 * PAGE + 3])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (8, 1)])
def test_prefill_and_decode_equal_transformers(
    tmp_path: Path, heads: tuple[int, int], length: int, chunks: str
) -> None:
    transformers = pytest.importorskip("transformers")
    config = tiny_config(num_heads=heads[0], num_kv_heads=heads[1], num_layers=3)
    runner = make_runner(tmp_path, config, torch.float32)
    ids, pages = random_ids(length), [9, 2, 31]
    size = length if chunks == "whole" else int(chunks)
    fills: tuple[SlotFill, ...] = (fill(3, ids, pages[: -(-length // PAGE)]),)
    for start in range(0, length, size):
        count = min(size, length - start)
        row = PrefillRow(3, start, count, samples=start + count == length)
        result = run(runner, StepPlan(start, (), (row,), fills))
        assert len(result.token_ids) == row.samples
        fills = ()
    tokens, logits = decode(runner, 3, length, PAGE + 2, [17, 4, 5] if length % PAGE == 0 else [17, 4])
    history = [*ids, result.token_ids[0], *tokens]
    reference = transformers.MistralForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    with torch.inference_mode():
        expected = reference(torch.tensor([history[:-1]])).logits[0]
    ours = torch.stack(logits)
    torch.testing.assert_close(ours, expected[length:], rtol=0, atol=1e-5 * expected.abs().max().item())
    assert history[length:] == expected[length - 1 :].argmax(-1).tolist()


# ---- against itself, in fp64


def alone(runner: Runner, ids: list[int], count: int) -> tuple[list[int], list[Tensor]]:
    """The tokens of one request that has the runner for itself, and the logits of each."""
    needed = -(-(len(ids) + count) // PAGE)
    first = run(
        runner, StepPlan(0, (), (PrefillRow(1, 0, len(ids), True),), (fill(1, ids, list(range(1, 1 + needed))),))
    )
    logits = [LOGITS[0][0]]
    slots, tokens = (1,), list(first.token_ids)
    for step in range(count - 1):
        tokens += run(runner, StepPlan(1 + step, slots)).token_ids
        logits.append(LOGITS[0][0])
    return tokens, logits


def test_a_mixed_batch_equals_each_request_alone(tmp_path: Path) -> None:
    config = tiny_config()
    lengths = (1, PAGE - 1, PAGE, PAGE + 1, 70)
    prompts = [random_ids(n, seed=n) for n in lengths]
    expected = [alone(make_runner(tmp_path, config), ids, 4) for ids in prompts]
    runner = make_runner(tmp_path, config)
    order = (1 + torch.randperm(40, generator=torch.Generator().manual_seed(3))).tolist()
    pages = [[order.pop() for _ in range(-(-(n + 4) // PAGE))] for n in lengths]
    slots = (4, 1, 6, 2, 3)
    tokens: list[list[int]] = [[] for _ in prompts]
    logits: list[list[Tensor]] = [[] for _ in prompts]
    # A new request joins at each step, in chunks of at most 40 tokens, while those before it decode.
    waiting = list(range(len(prompts)))
    decoding: list[int] = []
    done = [0] * len(prompts)
    for step in itertools.count():
        prefills, fills = [], []
        if waiting:
            new = waiting[0]
            count = min(40, lengths[new] - done[new])
            if done[new] == 0:
                fills.append(fill(slots[new], prompts[new], pages[new]))
            prefills.append(PrefillRow(slots[new], done[new], count, done[new] + count == lengths[new]))
            done[new] += count
        rows = [*decoding, *(waiting[:1] if prefills and prefills[0].samples else [])]
        result = run(runner, StepPlan(step, tuple(slots[i] for i in decoding), tuple(prefills), tuple(fills)))
        for row, token, row_logits in zip(rows, result.token_ids, LOGITS[0] if rows else [], strict=True):
            tokens[row].append(token)
            logits[row].append(row_logits)
        if prefills and prefills[0].samples:
            decoding.append(waiting.pop(0))
        decoding = [i for i in decoding if len(tokens[i]) < 4]
        if not waiting and not decoding:
            break
    for row, (right_tokens, right_logits) in enumerate(expected):
        assert tokens[row] == right_tokens
        torch.testing.assert_close(torch.stack(logits[row]), torch.stack(right_logits), rtol=0, atol=1e-11)


@pytest.mark.parametrize("is_sent", [False, True])
def test_the_same_slots_decode_on_without_anything_in_the_plan(
    is_sent: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device keeps the counters, and rows that stay are uploaded once, also where plans come from another
    process.
    """
    config = tiny_config()
    ids = random_ids(20)
    packed: list[Any] = []
    pack = StepRows.pack
    monkeypatch.setattr(StepRows, "pack", staticmethod(lambda *args: packed.append(args) or pack(*args)))
    results = []
    for slots in ((2, 5), (5, 2)):
        runner = make_runner(tmp_path, config)
        run(runner, StepPlan(0, (), (PrefillRow(2, 0, 20, True), PrefillRow(5, 0, 3, True)),
                             (fill(2, ids, (3, 4, 5)), fill(5, ids[:3], (6, 7)))))  # fmt: skip
        packed.clear()
        plans = [StepPlan(number, slots) for number in range(12)]
        if is_sent:
            plans = [pickle.loads(pickle.dumps(plan)) for plan in plans]
        results.append([run(runner, plan).token_ids for plan in plans])
        assert len(packed) == 1
    assert results[0] == [pair[::-1] for pair in results[1]]
    assert len({tuple(pair) for pair in results[0]}) > 1


def test_rows_of_one_step_may_share_pages(tmp_path: Path) -> None:
    """Keys of all rows are written before any row attends: a row may read what another one of its step fills."""
    config = tiny_config()
    ids = random_ids(2 * PAGE + 5)
    expected, _ = alone(make_runner(tmp_path, config), ids, 1)
    runner = make_runner(tmp_path, config)
    plan = StepPlan(
        0,
        (),
        (PrefillRow(1, 2 * PAGE, 5, True), PrefillRow(2, 0, 2 * PAGE, False)),  # the reader first
        (fill(1, ids, (11, 12, 13), computed=2 * PAGE), fill(2, ids, (11, 12, 14))),
    )
    assert run(runner, plan).token_ids == expected


def test_a_refilled_slot_keeps_nothing(tmp_path: Path) -> None:
    config = tiny_config()
    first, second = random_ids(50, seed=1), random_ids(18, seed=2)
    expected, _ = alone(make_runner(tmp_path, config), second, 5)
    runner = make_runner(tmp_path, config)
    alone(runner, first, 9)
    runner._kv_cache.poison(torch.arange(41))
    assert alone(runner, second, 5)[0] == expected


def test_a_request_refilled_with_its_own_output_goes_on(tmp_path: Path) -> None:
    """Preemption by recompute: prompt and output enter another slot and other pages, and the tokens go on as before."""
    config = tiny_config()
    ids = random_ids(PAGE + 3)
    tokens, _ = alone(make_runner(tmp_path, config), ids, 12)
    runner = make_runner(tmp_path, config)
    alone(runner, ids, 6)
    runner._kv_cache.poison(torch.arange(41))
    again = SlotFill(4, [*ids, *tokens[:6]], len(ids), 0, (30, 20), GREEDY, seed=1)
    resumed = run(runner, StepPlan(0, (), (PrefillRow(4, 0, len(ids) + 6, True),), (again,))).token_ids
    resumed += decode(runner, 4, len(ids) + 6, 5, [])[0]
    assert resumed == tokens[6:]


# ---- what a step reports


def test_a_poisoned_row_fails_alone(tmp_path: Path) -> None:
    config = tiny_config()
    prompts = [random_ids(20, seed=1), random_ids(20, seed=2)]
    expected = [alone(make_runner(tmp_path, config), ids, 2)[0] for ids in prompts]
    runner = make_runner(tmp_path, config)
    prefills = tuple(PrefillRow(slot, 0, 20, True) for slot in (1, 2))
    run(runner, StepPlan(0, (), prefills, (fill(1, prompts[0], (1, 2)), fill(2, prompts[1], (3, 4)))))
    runner._kv_cache.poison(torch.tensor([3]))
    result = run(runner, StepPlan(1, (1, 2)))
    assert result.token_ids == [expected[0][1], TOKEN_NOT_FINITE]
    assert runner._table.token_ids[2, 21] == 0  # an id that the embedding has


def test_a_row_without_a_choice_fails_alone(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, tiny_config())
    ids = random_ids(5)
    nothing = SamplingParams(temperature=0.0, allowed_token_ids=[2], min_tokens=3, stop_token_ids=[2])
    stuck = SlotFill(1, ids, 5, 0, (1,), nothing, seed=0, stop_token_ids=frozenset([2]))
    result = run(
        runner, StepPlan(0, (), (PrefillRow(1, 0, 5, True), PrefillRow(2, 0, 5, True)), (stuck, fill(2, ids, (2,))))
    )
    assert result.token_ids[0] == TOKEN_ALL_MASKED and result.token_ids[1] >= 0


@pytest.mark.parametrize("chunk", [40, 16, 7])
@pytest.mark.parametrize("rows_at_once", [256, 5])
def test_prompt_logprobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, rows_at_once: int) -> None:
    monkeypatch.setattr(step_compute, "PROMPT_LOGPROB_ROWS", rows_at_once)
    runner = make_runner(tmp_path, tiny_config())
    prompt, output = random_ids(33), [4, 5]  # refilled with two tokens of output, which are not reported
    params = SamplingParams(temperature=0.0, prompt_logprobs=2)
    ids = [*prompt, *output]
    fills: tuple[SlotFill, ...] = (SlotFill(1, ids, 33, 0, (5, 3, 9), params, 0), fill(2, prompt, (1, 2, 4)))
    entries = []
    for start in range(0, len(ids), chunk):
        count = min(chunk, len(ids) - start)
        last = start + count == len(ids)
        result = run(
            runner,
            StepPlan(
                start, (), (*[PrefillRow(2, 0, 33, True)] * (not start), PrefillRow(1, start, count, last)), fills
            ),
        )
        fills = ()
        index = 0 if start else 1
        assert set(result.prompt_logprobs) <= {index}
        found = result.prompt_logprobs.get(index, [])
        assert len(found) == max(0, min(count, 32 - start))
        entries += found
    assert [entry.token_ids[0] for entry in entries] == prompt[1:]
    for length in (1, 16, 31):
        probe = make_runner(tmp_path, tiny_config())
        alone(probe, prompt[:length], 1)
        right = LOGITS[0][0].log_softmax(-1)
        entry = entries[length - 1]
        assert math.isclose(entry.logprobs[0], right[prompt[length]].item(), abs_tol=1e-10)
        assert entry.token_ids[1:] == right.topk(2).indices.tolist()


def test_prompt_logprobs_end_with_the_request_that_asked(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, tiny_config())
    row, ids = PrefillRow(1, 0, 9, True), random_ids(9)
    asking = fill(1, ids, (1,), params=SamplingParams(temperature=0.0, prompt_logprobs=0))
    assert [len(found) for found in run(runner, StepPlan(0, (), (row,), (asking,))).prompt_logprobs.values()] == [8]
    assert run(runner, StepPlan(1, (), (row,), (fill(1, ids, (1,)),))).prompt_logprobs == {}


def test_logprobs_of_sampled_tokens(tmp_path: Path) -> None:
    runner = make_runner(tmp_path, tiny_config())
    ids = random_ids(9)
    asking = fill(2, ids, (2,), params=SamplingParams(temperature=0.0, logprobs=1))
    plan = StepPlan(0, (), (PrefillRow(1, 0, 9, True), PrefillRow(2, 0, 9, True)), (fill(1, ids, (1,)), asking))
    result = run(runner, plan)
    assert set(result.logprobs) == {1} and result.logprobs[1].token_ids == [result.token_ids[1]] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_run(tmp_path: Path, dtype: torch.dtype) -> None:
    config = tiny_config()
    ids = random_ids(30)
    _, exact = alone(make_runner(tmp_path, config), ids, 1)
    _, ours = alone(make_runner(tmp_path, config, dtype), ids, 1)
    assert ours[0].dtype == dtype
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=0, atol=0.05 * exact[0].abs().max().item())


def test_the_last_position_of_the_context(tmp_path: Path) -> None:
    """The token that fills the context can be sampled; every earlier position is computed."""
    runner = make_runner(tmp_path, tiny_config())
    tokens, _ = alone(runner, random_ids(MAX_LEN - 3), 3)
    assert len(tokens) == 3 and runner._table.num_computed[1] == MAX_LEN - 1


def test_close_drops_the_memory(tmp_path: Path) -> None:
    import weakref

    runner = make_runner(tmp_path, tiny_config())
    cache = weakref.ref(runner._kv_cache)
    alone(runner, random_ids(3), 2)
    runner.close()
    assert cache() is None


def test_attention_is_told_the_pages_of_each_prompt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The pages of the rows after the decodes are told, so that what is widened for them fits; all that a row holds, however little of it
    this step computes.
    """
    runner, seen = make_runner(tmp_path, tiny_config()), []
    meta_of = step_compute.AttentionMeta
    monkeypatch.setattr(step_compute, "AttentionMeta", lambda *args: seen.append(meta_of(*args)) or seen[-1])
    ids = random_ids(60)
    fills = (fill(1, ids[:20], [1, 2]), fill(2, ids, [3, 4, 5, 6]), fill(3, ids[:5], [7]))
    run(runner, StepPlan(0, (), (PrefillRow(1, 0, 20, True),), fills[:1]))
    run(runner, StepPlan(1, (1,), (PrefillRow(2, 0, 30, False), PrefillRow(3, 0, 5, True)), fills[1:]))
    run(runner, StepPlan(2, (1, 3), (PrefillRow(2, 30, 30, True),)))
    run(runner, StepPlan(3, (1, 2, 3)))
    assert [(meta.num_decodes, meta.prefill_pages) for meta in seen] == [(0, (2,)), (1, (4, 1)), (2, (4,)), (3, None)]
