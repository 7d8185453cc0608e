"""Decode steps as graphs equal eager steps: emulated on the CPU with every operation in Triton's interpreter, real on a
GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_engine.checkpoint.checkpoint import open_checkpoint
from nemo_engine.checkpoint.loader import load_weights
from nemo_engine.config import EngineConfig
from nemo_engine.memory_plan import graph_sizes
from nemo_engine.ops import ALL_OPS, SEMANTICS, Ops, Site, flash_attn
from nemo_engine.ops.quantize import FP8
from nemo_engine.runner.graphs import Captured, StepGraph, cuda_capture
from nemo_engine.runner.mixed_graphs import MixedShape
from nemo_engine.runner.runner import Runner
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.step import TOKEN_NOT_TAKEN, PrefillRow, SlotFill, StepPlan, StepResult
from tests.helpers.checkpoints import random_state_dict, tiny_config, write_hf
from tests.helpers.fp8_checkpoints import write_fp8

PAGE = 16
SLOTS = 7


@pytest.mark.parametrize("most", [1, 2, 3, 8, 24, 100, 256, 300, 1024])
def test_graph_sizes(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes[-1] == most and list(sizes) == sorted(set(sizes)) and sizes[0] == 1
    assert len(sizes) <= 30
    for count in range(1, most + 1):
        padded = next(size for size in sizes if size >= count)
        assert padded <= max(2 * count - 1, 8 + count) and padded - count <= 63


def ops_by(name: str, site: Site) -> Ops:
    """Every operation by the implementation of that name, and by its definition where it has none."""
    if name == "flash_attn":  # which is for GPUs; the definition of sampling cannot be captured
        definitions = Ops.select(site, dict.fromkeys([op.name for op in ALL_OPS], SEMANTICS) | {"sample_": "cuda"})
        return dataclasses.replace(definitions, paged_attention=flash_attn.paged_attention)
    having = {op.name for op in ALL_OPS if any(impl.name == name for impl in op.impls)}
    others = {op.name for op in ALL_OPS if op.composed is None and site.device_type == "cpu"} - having
    # Raises where one cannot serve. Embeddings by torch: a capture that is emulated sees no call into csrc/cpu.
    return Ops.select(site, dict.fromkeys(others, SEMANTICS) | dict.fromkeys(having, name) | {"embed": "gather"})


def make_runner(
    path: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    is_fp8: bool = False,
    vocab_size: int = 97,
    kernels: str = "triton",
    has_fp8_cache: bool = False,
) -> Runner:
    """is_fp8: weights, inputs by static scales, and keys and values by scales of their heads; has_fp8_cache: keys and
    values alone, by scales of 1.
    """
    kv_dtype = FP8 if is_fp8 or has_fp8_cache else dtype
    config = tiny_config(
        num_heads=4, num_kv_heads=2, head_dim=16 if kernels == "triton" else 128, hidden_size=64, intermediate_size=48,
        vocab_size=vocab_size,
    )  # fmt: skip
    if not (path / "config.json").exists():
        state = random_state_dict(config, seed=5)
        if is_fp8:
            write_fp8(path, config, state, "fp8 static", kv="head")
        else:
            write_hf(path, config, state)
    checkpoint = open_checkpoint(path)
    weights = load_weights(checkpoint, config, dtype=dtype, device=device, progress=False, needs_kv_scales=is_fp8)
    return Runner(
        config,
        EngineConfig(
            device="cpu",
            page_size=PAGE,
            max_num_seqs=SLOTS,
            max_num_batched_tokens=128,
            speculative_config={"method": "ngram"},
        ),  # fmt: skip
        weights,
        ops_by(kernels, Site.of(config, PAGE, dtype, device, kv_dtype)),
        num_pages=60,
        max_model_len=100,
        device=device,
        kv_dtype=kv_dtype,
    )


WANTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 5, "top_p": 0.9},
    {"temperature": 1.2, "frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 0.7, "logit_bias": {3: 4.0}, "min_p": 0.05},
]


def play(runner: Runner, steps: int = 20) -> list[StepResult]:
    """Requests of several kinds come and go; every step's results. Two steps are in flight, as in the engine."""
    lengths = [3, 15, 16, 17, 30, 1]
    results, handles = [], []
    fresh = iter(range(1, 61))
    pages: dict[int, list[int]] = {}
    computed: dict[int, int] = {}
    slots: tuple[int, ...] = ()
    for step in range(steps):
        fills, prefills, new_pages = [], [], []
        if step % 3 == 0 and step // 3 < len(lengths):  # one comes
            index = step // 3
            length, slot = lengths[index], index + 1
            ids = torch.randint(0, 97, (length,), generator=torch.Generator().manual_seed(index)).tolist()
            pages[slot] = [next(fresh) for _ in range(-(-length // PAGE))]
            params = SamplingParams(max_tokens=50, **WANTS[index])
            fills.append(SlotFill(slot, ids, length, 0, tuple(pages[slot]), params, seed=index + 7))
            prefills.append(PrefillRow(slot, 0, length, True))
            computed[slot] = length
        if step == 14:  # one goes
            slots = tuple(slot for slot in slots if slot != 2)
        for slot in slots:
            if computed[slot] // PAGE == len(pages[slot]):
                pages[slot].append(next(fresh))
                new_pages.append((slot, len(pages[slot]) - 1, pages[slot][-1]))
            computed[slot] += 1
        sampling = [*slots, *[row.slot for row in prefills]]
        masks = [
            (slot, bytes([step * 37 % 256 | 1, slot, 255, 7] * 4)) for slot in sampling if step % 4 and slot in (2, 5)
        ]
        handles.append(
            runner.launch(StepPlan(step, slots, tuple(prefills), tuple(fills), tuple(new_pages), tuple(masks)))
        )
        if prefills:
            slots = (*slots, prefills[0].slot)
        if len(handles) == 2:
            results.append(handles.pop(0).result())
    return results + [handle.result() for handle in handles]


def count_replays(runner: Runner) -> dict[int, int]:
    """How often a step with prompts was a graph of each size, from now on."""
    replays: dict[int, int] = {}

    def counted(shape: MixedShape, graph: StepGraph) -> tuple[MixedShape, StepGraph]:
        replays[shape.num_tokens] = 0

        def count(captured: Captured[Any]) -> Captured[Any]:
            def replay() -> None:
                replays[shape.num_tokens] += 1
                captured.replay()

            return Captured(captured.outputs, replay)

        return shape, dataclasses.replace(graph, forward=count(graph.forward))

    runner._mixed_graphs = tuple([counted(*pair) for pair in runner._mixed_graphs])
    return replays


@pytest.mark.interpreted
@pytest.mark.usefixtures("small_gpu")
@pytest.mark.parametrize("is_fp8", [False, True], ids=["fp32", "fp8"])
def test_emulated_graphs_equal_eager_steps(is_fp8: bool, tmp_path: Path) -> None:
    from tests.runner.emulated_graphs import emulated_capture

    device = torch.device("cpu")
    steps = 6 if is_fp8 else 20
    eager = play(make_runner(tmp_path, device, torch.float32, is_fp8=is_fp8), steps)
    runner = make_runner(tmp_path, device, torch.float32, is_fp8=is_fp8)
    runner.capture((1, 2, 4, 7), emulated_capture, mixed_sizes=(16, 40))
    replays = count_replays(runner)
    graphed = play(runner, steps)
    assert [*replays.values()] == ([2, 0] if is_fp8 else [3, 3]), replays
    assert len({tuple(result.token_ids) for result in eager}) > steps // 2
    assert [result.token_ids for result in graphed] == [result.token_ids for result in eager]
    for one, other in zip(graphed, eager, strict=True):
        assert one.logprobs.keys() == other.logprobs.keys()
        for row, entry in one.logprobs.items():
            assert entry.token_ids == other.logprobs[row].token_ids and entry.ranks == other.logprobs[row].ranks
    assert is_fp8 or sum(len(result.logprobs) for result in graphed) > 5


WIDE = ((10, 2), (20, 4), (40, 8))  # rows and width


def play_wide(runner: Runner, widths: Sequence[int]) -> tuple[list[StepResult], dict[int, list[int]]]:
    """Texts that repeat themselves in steps of ``widths``, of which one has a prompt too; results and tokens by slot."""
    plans = []
    for slot, (want, phrase) in enumerate(zip(WANTS[:5], ([1, 2, 3], [4], [1, 2], [3, 4], [0, 1, 2, 4])), 1):
        ids = (phrase * 24)[:24]
        params = SamplingParams(max_tokens=70, **want)
        draft_until = 0 if params.has_penalties else 94
        pages = tuple(range(7 * slot, 7 * slot + 7))
        plans.append((SlotFill(slot, ids, 24, 0, pages, params, slot, draft_until=draft_until), slot))
    fills = [fill for fill, _ in plans]
    prefills = [PrefillRow(slot, 0, 24, True) for _, slot in plans]
    handles = [runner.launch(StepPlan(0, (), tuple(prefills[:4]), tuple(fills[:4])))]
    slots: tuple[int, ...] = (1, 2, 3, 4)
    for step, width in enumerate(widths, 1):
        comes = step == 3
        more = (tuple(prefills[4:]), tuple(fills[4:])) if comes else ((), ())
        handles.append(runner.launch(StepPlan(step, slots, *more, width=width)))
        slots = (4, 2, 5, 1, 3) if comes else slots
    results = [handle.result() for handle in handles]
    tokens: dict[int, list[int]] = {slot: [] for slot in range(1, 6)}
    slots = (1, 2, 3, 4)
    for slot, token in zip(slots, results[0].token_ids, strict=True):
        tokens[slot].append(token)
    for step, (width, result) in enumerate(zip(widths, results[1:], strict=True), 1):
        for row, slot in enumerate(slots):
            tokens[slot] += [token for token in result.token_ids[row * width : (row + 1) * width] if token >= 0]
        if step == 3:
            slots = (4, 2, 5, 1, 3)
            tokens[5].append(result.token_ids[-1])
    return results, tokens


@pytest.mark.interpreted
@pytest.mark.usefixtures("small_gpu")
def test_wide_steps_as_emulated_graphs_equal_eager_and_narrow_ones(tmp_path: Path) -> None:
    from tests.runner.emulated_graphs import emulated_capture

    device, widths = torch.device("cpu"), (4, 2, 4, 1, 8, 4)
    narrow = play_wide(make_runner(tmp_path, device, torch.float32, vocab_size=5), [1] * 8)[1]
    eager, tokens = play_wide(make_runner(tmp_path, device, torch.float32, vocab_size=5), widths)
    runner = make_runner(tmp_path, device, torch.float32, vocab_size=5)
    runner.capture((5,), emulated_capture, WIDE, (112,))
    replays = count_replays(runner)
    graphed, again = play_wide(runner, widths)
    assert replays == {112: 1}, "the first prompts are a graph, wide steps with one are not"
    assert [result.token_ids for result in graphed] == [result.token_ids for result in eager] and again == tokens
    assert all(one[: len(tokens[slot])] == tokens[slot][: len(one)] for slot, one in narrow.items())
    num_narrow = 4 * (1 + len(widths)) + 1 + len(widths) - 3
    assert sum(map(len, tokens.values())) > num_narrow + 5, "too few drafts are right"
    assert any(TOKEN_NOT_TAKEN in result.token_ids for result in eager), "no draft is wrong"
    for one, other in zip(graphed, eager, strict=True):
        assert {row: entry.token_ids for row, entry in one.logprobs.items()} == {
            row: entry.token_ids for row, entry in other.logprobs.items()
        }
    assert sum(len(result.logprobs) for result in graphed) >= len(tokens[5])


@pytest.mark.interpreted
@pytest.mark.usefixtures("small_gpu")
def test_padding_leaves_no_trace(tmp_path: Path) -> None:
    """Rows that only fill a graph up write to page 0 and slot 0's scratch, and nowhere else."""
    from tests.runner.emulated_graphs import emulated_capture

    runner = make_runner(tmp_path, torch.device("cpu"), torch.float32)
    runner.capture((7,), emulated_capture)
    runner._kv_cache.poison(torch.arange(1, 61))
    table = runner._table
    fill = SlotFill(3, [5, 6, 7], 3, 0, (9,), SamplingParams(temperature=0.0), seed=0)
    runner.launch(StepPlan(0, (), (PrefillRow(3, 0, 3, True),), (fill,))).result()
    before = [table.token_ids.clone(), table.page_table.clone(), table.num_computed.clone()]
    assert runner.launch(StepPlan(1, (3,))).result().token_ids[0] >= 0
    others = torch.tensor([slot for slot in range(SLOTS + 1) if slot != 3])
    for was, now in zip(before, (table.token_ids, table.page_table, table.num_computed), strict=True):
        assert torch.equal(was[others], now[others])
    assert table.token_ids[0, 0] == 0 and table.num_computed[0] == 0 and table.num_computed[3] == 4
    for k, v in (kv.caches for kv in runner._kv_cache.layers):
        written = ~k[1:].isnan().all(-1).all(1).flatten()
        assert written.nonzero().flatten().tolist() == [8 * PAGE + i for i in range(4)]
        assert torch.equal(k[1:].isnan(), v[1:].isnan())


@pytest.mark.interpreted
def test_a_capture_refuses_to_wait_for_the_device() -> None:
    from tests.runner.emulated_graphs import emulated_capture

    x = torch.ones(3)
    with pytest.raises(RuntimeError, match="the host would wait"):
        emulated_capture(lambda: x.sum().item())
    with pytest.raises(RuntimeError, match="the host would wait|shape depends"):
        emulated_capture(lambda: x[x > 0])


@pytest.mark.gpu
def test_graphs_equal_eager_steps(tmp_path: Path) -> None:
    device = torch.device("cuda")
    results = []
    for sizes in ((), (1, 2, 4, 7)):
        runner = make_runner(tmp_path, device, torch.float32)
        runner.warm_up(sizes)
        if sizes:
            runner.capture(sizes, cuda_capture(device))
        results.append([result.token_ids for result in play(runner)])
        runner.close()
    assert results[0] == results[1]


@pytest.mark.gpu
def test_wide_graphs_equal_eager_and_narrow_steps(tmp_path: Path) -> None:
    device, widths = torch.device("cuda"), (4, 2, 4, 1, 8, 4)
    eager, tokens = play_wide(make_runner(tmp_path, device, torch.float32, vocab_size=5), widths)
    narrow = play_wide(make_runner(tmp_path, device, torch.float32, vocab_size=5), [1] * 12)[1]
    runner = make_runner(tmp_path, device, torch.float32, vocab_size=5)
    runner.warm_up((5,), WIDE)
    runner.capture((5,), cuda_capture(device), WIDE)
    graphed, _ = play_wide(runner, widths)
    assert [result.token_ids for result in graphed] == [result.token_ids for result in eager]
    assert all(one[: len(tokens[slot])] == tokens[slot][: len(one)] for slot, one in narrow.items())


@pytest.mark.gpu
@pytest.mark.parametrize("masks", [(), ((3, bytes([255] * 16)),)], ids=["free", "masked"])
@pytest.mark.parametrize(
    "wants", [{}, {"logprobs": 2}, {"top_p": 0.9, "presence_penalty": 0.1}, {"logit_bias": {5: 1.0}}]
)
def test_a_decode_step_never_waits(tmp_path: Path, wants: dict[str, Any], masks: tuple[tuple[int, bytes], ...]) -> None:
    device = torch.device("cuda")
    runner = make_runner(tmp_path, device, torch.float32)
    sizes = (1, 2, 4, 7)
    runner.warm_up(sizes)
    runner.capture(sizes, cuda_capture(device))
    fill = SlotFill(3, [5, 6, 7], 3, 0, (9,), SamplingParams(temperature=0.9, **wants), seed=0)
    runner.launch(StepPlan(0, (), (PrefillRow(3, 0, 3, True),), (fill,))).result()
    slots = (3,)
    runner.launch(StepPlan(1, slots, masks=masks)).result()  # the batch's own tensors are made
    torch.cuda.set_sync_debug_mode("error")
    try:
        handles = [runner.launch(StepPlan(step, slots, masks=masks)) for step in range(2, 8)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(handle.result().token_ids[0] >= 0 for handle in handles)
