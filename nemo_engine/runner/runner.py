"""Computes steps: keeps requests, keys and values on the device, derives the model's inputs there, samples, reports.

Knows neither scheduler nor text: a ``StepPlan`` comes in, a ``StepResult`` goes out. ``launch`` reads nothing back from
the device, so on CUDA it never waits; ``LaunchedStep.result`` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.model.nemo import Nemo
from nemo_engine.model.weights import NemoWeights
from nemo_engine.ops import Ops
from nemo_engine.runner import warmup
from nemo_engine.runner.drafted_runs import DraftedRuns
from nemo_engine.runner.graphs import Capture, StepGraph, capture_decodes
from nemo_engine.runner.kv_cache import KVCache
from nemo_engine.runner.launched_step import LaunchedStep
from nemo_engine.runner.mixed_graphs import MixedShape, capture_mixed
from nemo_engine.runner.precision import bits_depend_on_threads_from
from nemo_engine.runner.recorded import MAX_ROWS, RecordedDecodes, why_not_recorded
from nemo_engine.runner.request_table import RequestTable
from nemo_engine.runner.sampler import Sampler
from nemo_engine.runner.slot_fills import SlotFills
from nemo_engine.runner.step_compute import StepCompute
from nemo_engine.runner.step_rows import StepRows
from nemo_engine.runner.threads import Cores
from nemo_engine.runner.transfer import to_device
from nemo_engine.step import StepPlan


class Runner:
    """The device half.

    ``num_pages`` usable pages, contexts of up to ``max_model_len`` tokens; ``without_token`` as ``Sampler`` takes it.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: EngineConfig,
        weights: NemoWeights,
        ops: Ops,
        *,
        num_pages: int,
        max_model_len: int,
        device: torch.device,
        kv_dtype: torch.dtype,
        without_token: Sequence[int] = (),
    ) -> None:
        self._device = device
        self._max_num_batched_tokens = config.tokens_per_step
        self._kv_cache = KVCache(model_config, weights, num_pages, config.page_size, kv_dtype)
        vocab_size = model_config.vocab_size
        self._table = RequestTable(config.max_num_seqs, max_model_len, config.page_size, num_pages, vocab_size, device)
        self._sampler = Sampler(config.max_num_seqs, vocab_size, ops, device, without_token)
        self._fills = SlotFills(self._table, self._sampler)
        model = Nemo(model_config, weights, ops, max_model_len)
        max_drafts = config.num_speculative_tokens
        self._max_width = max(config.widths, default=1)
        self._step = StepCompute(model, ops, self._kv_cache, self._table, self._sampler, max_drafts)
        page_bytes = self._kv_cache.num_bytes // (num_pages + 1)
        is_cpu = device.type == "cpu"
        adapts_below = bits_depend_on_threads_from(weights, ops)
        self._cores = Cores(weights.num_bytes, page_bytes, adapts_below=adapts_below) if is_cpu else None
        self._prompt_lens: dict[int, int] = {}  # slots that want prompt log-probabilities -> their prompt's length
        self._graphs: tuple[StepGraph, ...] = ()
        self._mixed_graphs: tuple[tuple[MixedShape, StepGraph], ...] = ()
        self._recorded: RecordedDecodes | None = None
        # The decode rows of the last upload, which are used again while what they follow from is the same: (slots,
        # width, size, changes of the table). None if a row got a page in that step.
        self._last: tuple[tuple[tuple[int, ...], int, int, int], StepRows] | None = None

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Compute ``plan``; see ``step`` for what a plan means."""
        self._fills.prepare(plan.fills)
        for fill in plan.fills:
            self._prompt_lens.pop(fill.slot, None)
            if fill.params.prompt_logprobs is not None:
                self._prompt_lens[fill.slot] = fill.num_prompt_tokens
        new_pages = self._table.take_new_pages(plan)
        if not plan.prefills:
            return self._launch_decodes(plan, new_pages)
        slots = (*plan.decode_slots, *[row.slot for row in plan.prefills])
        with self._on_cores(plan.num_tokens, slots):
            return self._launch_rows(plan, new_pages)

    def _on_cores(self, num_tokens: int, slots: tuple[int, ...]) -> AbstractContextManager[None]:
        """On a CPU, run a step of ``num_tokens`` of ``slots`` inside on as many cores as it should take."""
        if self._cores is None:
            return nullcontext()
        return self._cores.step(num_tokens, sum([self._table.num_pages[slot] for slot in slots]))

    def _launch_rows(self, plan: StepPlan, new_pages: dict[int, tuple[int, int]]) -> LaunchedStep:
        if not any(row.slot in self._prompt_lens for row in plan.prefills):
            for shape, graph in self._mixed_graphs:
                if shape.holds(plan, self._table.num_pages):
                    self._fills.upload(shape.pack(plan, new_pages), graph.words)
                    sampling = [*plan.decode_slots, *[row.slot for row in plan.prefills if row.samples]]
                    return self._replay(graph, plan, tuple(sampling))
        decodes = self._table.rows_of(plan.decode_slots, plan.width)
        slots = [*decodes, *[row.slot for row in plan.prefills]]
        counts = [1] * len(decodes) + [row.num_tokens for row in plan.prefills]
        sampled = [*range(len(decodes))]
        sampled += [index for index, row in enumerate(plan.prefills, len(decodes)) if row.samples]
        words = self._fills.upload(StepRows.pack(slots, counts, new_pages, sampled))
        num_pages = max(self._table.num_pages[slot] for slot in slots)
        prefill_pages = tuple([self._table.num_pages[row.slot] for row in plan.prefills])
        sizes = len(slots), len(decodes), sum(counts), max(counts), num_pages
        rows = StepRows.of(words, *sizes, prefill_pages, plan.width)
        return self._run(plan, rows, tuple(slots[row] for row in sampled))

    def _launch_decodes(self, plan: StepPlan, new_pages: dict[int, tuple[int, int]]) -> LaunchedStep:
        slots, width = self._table.rows_of(plan.decode_slots, plan.width), plan.width
        if self._recorded is not None and (width == 1 or not plan.fills):  # drafts follow from what is in the table
            runs = DraftedRuns.of(self._step, slots, width)
            if len(runs.slots) <= self._recorded.size:
                with self._on_cores(len(runs.slots), plan.decode_slots):
                    rows = self._decode_rows(runs.slots, 1, new_pages, self._recorded)
                    return runs.launch(self._recorded, rows, plan)
        graph = next((g for g in self._graphs if g.rows.width == width and g.size >= len(slots)), None)
        with self._on_cores(plan.num_tokens, plan.decode_slots):
            rows = self._decode_rows(slots, width, new_pages, graph)
            return self._run(plan, rows, slots) if graph is None else self._replay(graph, plan, slots)

    def _run(self, plan: StepPlan, rows: StepRows, slots: tuple[int, ...]) -> LaunchedStep:
        """Compute a step operation by operation; ``slots``: whose rows sample."""
        hidden, seq_lens = self._step.forward(rows)
        prompt_reports = self._step.prompt_reports(plan, self._prompt_lens, hidden) if self._prompt_lens else {}
        logits = self._step.logits(rows, hidden, seq_lens)
        return LaunchedStep(plan, *self._step.choose(rows, slots, logits, plan.masks), prompt_reports)

    def _replay(self, graph: StepGraph, plan: StepPlan, slots: tuple[int, ...]) -> LaunchedStep:
        """Run a graph whose words are on the device; ``slots``: whose rows sample."""
        graph.forward.replay()
        if self._sampler.needs_only_tokens(slots, plan.masks):
            graph.finish.replay()
            return LaunchedStep(plan, graph.finish.outputs[: len(slots)], [], {})
        return LaunchedStep(plan, *self._step.choose(graph.rows, slots, graph.forward.outputs, plan.masks), {})

    def _decode_rows(
        self,
        slots: tuple[int, ...],
        width: int,
        new_pages: dict[int, tuple[int, int]],
        graph: StepGraph | RecordedDecodes | None,
    ) -> StepRows:
        """The rows on the device, in the graph's own words if there is one: uploaded only if they changed since the
        step before.
        """
        size = len(slots) if graph is None else graph.size
        key = slots, width, size, self._table.num_changes
        if self._last is not None and self._last[0] == key:
            return self._last[1]
        if self._last is not None and graph is self._recorded is not None and self._last[0][1:] == key[1:]:
            rows = self._last[1]  # nothing is new but which slots they are
            rows.slots[: len(slots)].copy_(to_device(slots, rows.slots.device))
            self._last = (key, rows)
            return rows
        self._last = None
        padded = [*slots, *[0] * (size - len(slots))]
        packed = StepRows.pack(padded, [1] * size, new_pages, range(size))
        words = self._fills.upload(packed, None if graph is None else graph.words)
        num_pages = self._table.page_table.shape[1]
        if graph is None:
            num_pages = max([self._table.num_pages[slot] for slot in slots], default=0)
        rows = StepRows.of(words, size, size, size, 1, num_pages, width=width)
        if not new_pages:
            self._last = (key, rows)
        return rows

    # ---- start-up and end

    @torch.inference_mode()
    def settle(self) -> None:
        """Prepare the calling thread to launch all steps while other threads compute too. Call it before the first
        step.
        """
        warmup.settle(self._step, self._max_num_batched_tokens)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def warm_up(self, sizes: Sequence[int], wide_sizes: Sequence[tuple[int, int]] = ()) -> None:
        """See ``warmup.warm_up``. sizes: rows of the decode steps that will be captured; wide_sizes: (rows, width)."""
        warmup.warm_up(self._step, sizes, wide_sizes, self._max_num_batched_tokens)

    @torch.inference_mode()
    def capture(
        self,
        sizes: Sequence[int],
        capture: Capture,
        wide_sizes: Sequence[tuple[int, int]] = (),
        mixed_sizes: Sequence[int] = (),
    ) -> None:
        """Capture decode steps of ``sizes`` rows, wide ones, and steps with prompts of up to ``mixed_sizes`` tokens."""
        self._mixed_graphs = capture_mixed(self._step, mixed_sizes, capture)
        self._graphs = capture_decodes(self._step, [*[(size, 1) for size in sizes], *wide_sizes], capture)
        self._step.workspace.freeze()

    @torch.inference_mode()
    def record(self) -> str:
        """On a CPU, record decode steps, which ``launch`` does again in one call from then on. Says what was recorded,
        or why not.
        """
        reason = why_not_recorded(self._step)
        if reason is not None:
            return f"decode steps are not recorded: {reason}"
        self._recorded = RecordedDecodes(self._step, min(self._table.num_slots * self._max_width, MAX_ROWS))
        for width in (1, self._max_width) * 4:  # the first ones would tell the clocks of cores and widths nothing true
            self._launch_decodes(StepPlan(0, (0,), width=width), {})
        return f"decode steps of up to {self._recorded.size} rows are recorded, one call each"

    def count_saturated(self) -> tuple[int, int]:
        """See ``KVCache.count_saturated``; of the pages that requests have had."""
        return self._kv_cache.count_saturated(self._table.highest_page)

    def recover(self) -> None:
        """A step failed: forget the rows of the step before, and wait for the device.

        Raises what it says if it is lost.
        """
        self._last = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Drop all tensors and graphs, also if the device is lost; says so if an FP8 cache's scales were too small."""
        try:
            self._kv_cache.warn_if_saturated(self._table.highest_page)
        finally:
            self._graphs = self._mixed_graphs = ()
            self._recorded = None
            self._last = None
            del self._step, self._kv_cache, self._table, self._sampler, self._fills
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                torch.cuda.empty_cache()
