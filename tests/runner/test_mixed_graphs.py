"""Steps with prompts as graphs: any mixture of rows gives what eager steps give, and padding changes nothing."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from nemo_engine.config import EngineConfig
from nemo_engine.memory_plan import mixed_graph_sizes
from nemo_engine.runner.mixed_graphs import MixedShape
from nemo_engine.runner.runner import Runner
from nemo_engine.sampling_params import SamplingParams
from nemo_engine.step import PrefillRow, SlotFill, StepPlan
from tests.runner.test_graphs import PAGE, SLOTS, WANTS, count_replays, make_runner

CPU = torch.device("cpu")
BUDGET = 40
SIZES = (8, 24, BUDGET)
KINDS = {"chunk", "end", "abort", "prefix", "preemption", "mask", "1 decodes, 2 prompts", "0 decodes, 1 prompts"}


@pytest.mark.parametrize("limit", [1, 63, 64, 65, 1000, 1024, 1025, 8192])
def test_sizes_reach_the_largest_step_or_1024(limit: int) -> None:
    sizes = mixed_graph_sizes(EngineConfig(device="cpu", max_num_seqs=1, max_num_batched_tokens=limit))
    assert list(sizes) == sorted({*sizes}) and sizes[-1] == min(limit, 1024) and len(sizes) <= 6


@dataclass
class Request:
    ids: list[int]
    want: int
    slot: int = 0
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_prompt: int = 0


class Host:
    """A scheduler that does anything that a plan may say: chunks of any length, several prompts at once, prefixes of
    others' pages, preemptions, aborts, masks.
    """

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.free_pages = list(range(1, 61))
        self.free_slots = list(range(1, SLOTS + 1))
        self.random.shuffle(self.free_pages)
        self.kinds: set[str] = set()
        self.sampling: list[Request] = []

    def _take(self, request: Request, length: int) -> None:
        while len(request.pages) * PAGE < length:
            request.pages.append(self.free_pages.pop())

    def _leave(self, request: Request, kind: str) -> None:
        self.kinds.add(kind)
        self.running.remove(request)
        self.free_slots.append(request.slot)  # pages stay: others may read them
        request.slot = 0

    def plan(self, step: int) -> StepPlan:
        """The next step, of up to ``BUDGET`` tokens."""
        rng = self.random
        if self.running and rng.random() < 0.15:
            self._leave(rng.choice(self.running), "abort")
        if self.running and rng.random() < 0.2:
            victim = rng.choice(self.running)
            self._leave(victim, "preemption")
            victim.pages, victim.num_computed = [], 0
            self.waiting.insert(0, victim)
        if rng.random() < 0.7:
            ids = [rng.randrange(97) for _ in range(rng.choice([1, 2, 7, 15, 16, 17, 33, 50]))]
            self.waiting.append(Request(ids, rng.randrange(len(WANTS)), num_prompt=len(ids)))
        decodes = [r for r in self.running if r.num_computed == len(r.ids) - 1]
        if rng.random() < 0.2:
            decodes = []
        rng.shuffle(decodes)
        new_pages = []
        for request in decodes:
            before = len(request.pages)
            self._take(request, len(request.ids))
            new_pages += [(request.slot, i, request.pages[i]) for i in range(before, len(request.pages))]
        budget, fills, prefills = BUDGET - len(decodes), [], []
        rows = [r for r in self.running if r.num_computed < len(r.ids) - 1]
        while self.waiting and self.free_slots and rng.random() < 0.8:
            request = self.waiting.pop(0)
            request.slot = self.free_slots.pop(0)
            donors = [r for r in self.running if r.num_computed >= PAGE]
            if donors and not request.num_computed and request.num_prompt == len(request.ids) and rng.random() < 0.6:
                self.kinds.add("prefix")
                donor = rng.choice(donors)
                count = donor.num_computed // PAGE
                request.ids = [*donor.ids[: count * PAGE], *request.ids]
                request.num_prompt, request.num_computed = len(request.ids), count * PAGE
                request.pages = donor.pages[:count]
            self._take(request, len(request.ids))
            fills.append(SlotFill(
                request.slot, list(request.ids), request.num_prompt, request.num_computed, tuple(request.pages),
                SamplingParams(max_tokens=60, **WANTS[request.want]), seed=request.ids[0],
            ))  # fmt: skip
            self.running.append(request)
            rows.append(request)
        self.sampling = list(decodes)
        for request in rows:
            left = len(request.ids) - request.num_computed
            count = min(left if rng.random() < 0.6 else rng.randint(1, left), budget)
            if count:
                prefills.append(PrefillRow(request.slot, request.num_computed, count, count == left))
                self.sampling += [request] * (count == left)
                budget -= count
                request.num_computed += count
                self.kinds.add("end" if count == left else "chunk")
        for request in decodes:
            request.num_computed += 1
        self.kinds.add(f"{min(len(decodes), 1)} decodes, {min(len(prefills), 2)} prompts")
        masks = [
            (r.slot, bytes([step * 37 % 256 | 1, r.slot, 255, 7] * 4)) for r in self.sampling if rng.random() < 0.1
        ]
        self.kinds |= {"mask"} if masks else set()
        slots = tuple(r.slot for r in decodes)
        return StepPlan(step, slots, tuple(prefills), tuple(fills), tuple(new_pages), tuple(masks))

    def commit(self, tokens: list[int]) -> None:
        """The tokens of the step join their requests, which end at 90."""
        for request, token in zip(self.sampling, tokens, strict=True):
            assert token >= 0, "a row has read what it must not"
            request.ids.append(token)
            if len(request.ids) >= 90:
                self._leave(request, "length")


def check_steps(eager: Runner, runner: Runner, host: Host, num_steps: int = 12) -> dict[int, int]:
    """Steps of both give the same, all of those with prompts by graphs; returns how many by each."""
    replays, num_mixed, num_reports = count_replays(runner), 0, 0
    for step in range(num_steps):
        plan = host.plan(step)
        expected, result = eager.launch(plan).result(), runner.launch(plan).result()
        assert result.token_ids == expected.token_ids, plan
        assert result.logprobs.keys() == expected.logprobs.keys()
        for row, entry in result.logprobs.items():
            assert (entry.token_ids, entry.ranks) == (expected.logprobs[row].token_ids, expected.logprobs[row].ranks)
        host.commit(result.token_ids)
        num_mixed += bool(plan.prefills)
        num_reports += len(result.logprobs)
        for name in ("num_computed", "page_table", "token_ids"):
            ours, theirs = (getattr(each._table, name) for each in (runner, eager))
            for request in host.running:
                end = {"page_table": len(request.pages), "token_ids": request.num_computed}.get(name)
                assert torch.equal(ours[request.slot].flatten()[:end], theirs[request.slot].flatten()[:end])
    assert sum(replays.values()) == num_mixed and num_reports > 0
    return replays


@pytest.mark.interpreted
@pytest.mark.usefixtures("small_gpu")
def test_any_steps_as_emulated_graphs_equal_eager_ones(tmp_path: Path) -> None:
    from tests.runner.emulated_graphs import emulated_capture

    eager, runner = (make_runner(tmp_path, CPU, torch.float32) for _ in range(2))
    runner.capture((1, 4, 7), emulated_capture, mixed_sizes=SIZES)
    for each in (eager, runner):
        each._kv_cache.poison(torch.arange(1, 61))
    host = Host(3)
    replays = check_steps(eager, runner, host)
    assert sum(replays.values()) > 6 and min(replays.values()) > 0, replays
    assert host.kinds >= KINDS


@pytest.mark.interpreted
@pytest.mark.usefixtures("small_gpu")
def test_padding_of_a_step_with_prompts_leaves_no_trace(tmp_path: Path) -> None:
    from tests.runner.emulated_graphs import emulated_capture

    runner = make_runner(tmp_path, CPU, torch.float32)
    runner.capture((1,), emulated_capture, mixed_sizes=(BUDGET,))
    runner._kv_cache.poison(torch.arange(1, 61))
    table = runner._table
    fills = [SlotFill(slot, [5, 6, 7], 3, 0, (slot,), SamplingParams(temperature=0.0), 0) for slot in (3, 5)]
    runner.launch(StepPlan(0, (), (PrefillRow(3, 0, 3, True),), (fills[0],))).result()
    before = [table.token_ids.clone(), table.page_table.clone(), table.num_computed.clone()]
    plan = StepPlan(1, (3,), (PrefillRow(5, 0, 2, False),), (fills[1],))
    assert len(runner.launch(plan).result().token_ids) == 1
    others = torch.tensor([slot for slot in range(SLOTS + 1) if slot not in (3, 5)])
    for was, now in zip(before, (table.token_ids, table.page_table, table.num_computed), strict=True):
        assert torch.equal(was[others], now[others])
    assert table.num_computed.tolist() == [0, 0, 0, 4, 0, 2, 0, 0] and table.token_ids[5, :3].tolist() == [5, 6, 7]
    assert not table.token_ids[0].any() and not table.page_table[0].any()
    for cache in (cache for kv in runner._kv_cache.layers for cache in kv.caches):
        written = ~cache[1:].isnan().all(-1).all(1).flatten()
        assert written.nonzero().flatten().tolist() == [2 * PAGE + i for i in range(4)] + [
            4 * PAGE + i for i in range(2)
        ]


def test_a_plan_that_a_graph_cannot_hold_runs_without_it() -> None:
    shape = MixedShape(num_tokens=32, num_decodes=7, num_prompts=3, num_pads=1, num_sampled=7, max_pad=100)
    rows = tuple([PrefillRow(slot, 0, 8, True) for slot in range(1, 5)])
    plan = StepPlan(0, (5, 6), rows[:3])
    num_pages = [0, 1, 2, 3, *[9] * 6]
    assert shape.holds(plan, num_pages) and shape.holds(StepPlan(0, (5, 6), (PrefillRow(1, 0, 30, True),)), num_pages)
    for other in (
        dataclasses.replace(plan, width=2),
        StepPlan(0, (), rows),
        StepPlan(0, (5, 6), (PrefillRow(1, 0, 31, True),)),
        StepPlan(0, (*range(1, 9),), (PrefillRow(9, 0, 1, True),)),
    ):
        assert not shape.holds(other, num_pages)
    for limit, is_held in ((6, False), (7, True)):  # 1 + 2 + 3 pages, and one of 6 tokens of padding
        assert dataclasses.replace(shape, page_size=8, max_pages=limit).holds(plan, num_pages) is is_held


def test_words_of_a_padded_step() -> None:
    shape = MixedShape(num_tokens=20, num_decodes=3, num_prompts=2, num_pads=3, num_sampled=3, max_pad=8)
    plan = StepPlan(0, (4,), (PrefillRow(2, 5, 7, True),), new_pages=((4, 1, 9),))
    rows = shape.rows(torch.tensor(shape.pack(plan, {4: (1, 9)})), 5)
    assert rows.slots.tolist() == [4, 0, 0, 2, 0, 0, 0, 0]
    assert rows.starts.tolist() == [0, 1, 1, 1, 8, 8, 16, 20, 20] and rows.sampled.tolist() == [0, 3, 7]
    assert rows.new_page.tolist() == [9] + [-1] * 7 and (rows.num_decodes, rows.max_queries, rows.longest) == (
        3,
        20,
        20,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("kernels", "has_fp8_cache"), [("triton", False), ("cuda", False), ("cuda", True)])
def test_any_steps_as_graphs_equal_eager_ones(tmp_path: Path, kernels: str, has_fp8_cache: bool) -> None:
    from nemo_engine.runner.graphs import cuda_capture

    device = torch.device("cuda")
    if kernels == "cuda":
        pytest.importorskip("nemo_engine._C", reason="the CUDA kernels are not built here")
    dtype = {"triton": torch.float32, "cuda": torch.bfloat16}[kernels]

    def play(mixed_sizes: tuple[int, ...]) -> list[list[int]]:
        runner = make_runner(tmp_path, device, dtype, kernels=kernels, has_fp8_cache=has_fp8_cache)
        runner.warm_up((1, 4, 7))
        if mixed_sizes:
            runner.capture((1, 4, 7), cuda_capture(device), mixed_sizes=mixed_sizes)
        host, results = Host(3), []
        for step in range(40):
            results.append(runner.launch(host.plan(step)).result().token_ids)
            host.commit(results[-1])
        runner.close()
        return results

    assert play(()) == play(SIZES)
