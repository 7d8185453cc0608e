"""Steps with prompts as graphs over CUDA's kernels, emulated, in bf16 and in FP8, and over FlashAttention's calls: the
same as eager steps, whatever rows they have.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_engine.ops import flash_attn
from nemo_engine.runner.runner import Runner
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.step import TOKEN_NOT_TAKEN, PrefillRow, SlotFill, StepPlan
from tests.emulation.library import emulated
from tests.ops.test_flash_attn import stand_in
from tests.runner.emulated_graphs import emulated_capture
from tests.runner.test_graphs import PAGE, WIDE, count_replays, make_runner, play_wide
from tests.runner.test_mixed_graphs import BUDGET, Host, check_steps

CPU = torch.device("cpu")


@pytest.fixture
def library(emulated_library: Any) -> Iterator[Any]:
    emulated_library.emulator.set_num_sms(6)
    with emulated(emulated_library):
        yield emulated_library
    emulated_library.emulator.forget()
    emulated_library.emulator.set_num_sms(132)


def eager_runner(library: Any, path: Path, **kind: Any) -> Runner:
    """One whose pages are poisoned, and whose page 0, which is padding, any threads may write at the same time."""
    runner = make_runner(path, CPU, torch.bfloat16, kernels="cuda", **kind)
    for cache in (cache for kv in runner._kv_cache.layers for cache in kv.caches):
        library.emulator.allow_races(cache.data_ptr(), cache[0].nbytes)
    runner._kv_cache.poison(torch.arange(1, 61))
    return runner


def make_runners(library: Any, path: Path, sizes: tuple[int, ...], **kind: Any) -> tuple[Runner, Runner]:
    """One that runs eagerly, and one that replays steps with prompts of up to ``sizes`` tokens."""
    eager, runner = (eager_runner(library, path, **kind) for _ in range(2))
    runner.capture((), emulated_capture, mixed_sizes=sizes)
    return eager, runner


def check_pages(eager: Runner, runner: Runner) -> None:
    """Keys and values are the same to the bit but for page 0, and nothing else is written."""
    for one, other in zip(eager._kv_cache.layers, runner._kv_cache.layers, strict=True):
        for ours, theirs in zip(one.caches, other.caches, strict=True):
            assert torch.equal(ours[1:].view(torch.uint8), theirs[1:].view(torch.uint8))


def check_edges(eager: Runner, runner: Runner) -> None:
    """A graph that is all padding, full, without prompts, without decodes, or too small for the pages of a step."""
    ((shape, graph),) = runner._mixed_graphs
    replays, params = count_replays(runner), SamplingParams(temperature=0.0)

    @torch.inference_mode()
    def replayed(plan: StepPlan) -> list[int]:
        graph.words.copy_(torch.tensor(shape.pack(plan, {})))
        graph.forward.replay()
        graph.finish.replay()
        return graph.finish.outputs[: len(plan.decode_slots)].tolist()

    for step, (decodes, ids, page) in enumerate((((), [5], 1), ((1,), [*range(BUDGET - 1)], 2))):
        pages = tuple(range(page, page + 1 + len(ids) // PAGE))
        fill = SlotFill(step + 1, ids, len(ids), 0, pages, params, 0)
        plan = StepPlan(step, decodes, (PrefillRow(step + 1, 0, len(ids), True),), (fill,))
        assert runner.launch(plan).result().token_ids == eager.launch(plan).result().token_ids
        assert replayed(StepPlan(0, ())) == []
        check_pages(eager, runner)
    for step in (2, 3):
        plan = StepPlan(step, (2, 1))
        assert replayed(plan) == eager.launch(plan).result().token_ids
    check_pages(eager, runner)
    assert replays == {BUDGET: 2}
    runner._mixed_graphs = ((dataclasses.replace(shape, max_pages=4), graph),)
    fills = [SlotFill(slot, [1] * 17, 17, 0, (page, page + 1), params, 0) for slot, page in ((3, 6), (4, 8))]
    plan = StepPlan(4, (), (PrefillRow(3, 0, 17, True), PrefillRow(4, 0, 17, True)), tuple(fills))
    assert runner.launch(plan).result().token_ids == eager.launch(plan).result().token_ids
    assert replays == {BUDGET: 2}, "6 tokens of padding take a page more than there is room for"
    check_pages(eager, runner)


@pytest.mark.emulated
@pytest.mark.parametrize(("has_fp8_cache", "max_pages"), [(False, None), (True, 56)], ids=["bf16", "fp8 cache"])
def test_steps_over_cuda_as_emulated_graphs_equal_eager_ones(
    library: Any, tmp_path: Path, has_fp8_cache: bool, max_pages: int | None
) -> None:
    eager, runner = make_runners(library, tmp_path, (BUDGET,), has_fp8_cache=has_fp8_cache)
    assert runner._mixed_graphs[0][0].max_pages == max_pages
    host = Host(3)
    replays = check_steps(eager, runner, host, 9)
    assert replays[BUDGET] >= 7
    kinds = {"chunk", "end", "preemption", "1 decodes, 2 prompts", "0 decodes, 1 prompts", "abort", "prefix", "mask"}
    assert host.kinds >= kinds, host.kinds
    check_pages(eager, runner)
    check_edges(eager, runner)


@pytest.mark.emulated
@pytest.mark.parametrize("has_fp8_cache", [False, True], ids=["bf16", "fp8 cache"])
def test_wide_steps_over_cuda_as_emulated_graphs_equal_eager_and_narrow_ones(
    library: Any, tmp_path: Path, has_fp8_cache: bool
) -> None:
    """Runs of each width, whose padding counts where their keys are cut."""
    widths, kind = (4, 2, 8, 1, 8, 4), {"has_fp8_cache": has_fp8_cache, "vocab_size": 5}
    narrow = play_wide(eager_runner(library, tmp_path, **kind), [1] * 8)[1]
    results, tokens = play_wide(eager_runner(library, tmp_path, **kind), widths)
    runner = eager_runner(library, tmp_path, **kind)
    runner.capture((5,), emulated_capture, WIDE)
    graphed, again = play_wide(runner, widths)
    assert [result.token_ids for result in graphed] == [result.token_ids for result in results] and again == tokens
    assert all(one[: len(tokens[slot])] == tokens[slot][: len(one)] for slot, one in narrow.items())
    assert sum(map(len, tokens.values())) > 4 * len(widths) + 12, "too few drafts are right"
    assert any(TOKEN_NOT_TAKEN in result.token_ids for result in results), "no draft is wrong"


def test_steps_over_flash_attention_as_emulated_graphs_equal_eager_ones(
    library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn_interface", stand_in("flash_attn_interface"))
    flash_attn.choose.cache_clear()
    eager, runner = (make_runner(tmp_path, CPU, torch.bfloat16, kernels="flash_attn") for _ in range(2))
    for each in (eager, runner):
        each._kv_cache.poison(torch.arange(1, 61))
    runner.capture((), emulated_capture, mixed_sizes=(BUDGET,))
    assert check_steps(eager, runner, Host(3), 20)[BUDGET] > 10
    check_pages(eager, runner)
    check_edges(eager, runner)
    flash_attn.choose.cache_clear()
