"""Computes steps: keeps requests, keys and values on the device, derives the model's inputs there, samples, reports.

Knows neither scheduler nor text: a ``StepPlan`` comes in, a ``StepResult`` goes out. ``launch`` reads nothing back from the device, so on
CUDA it never waits; ``Handle.result`` does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nemo_engine.config import EngineConfig, ModelConfig
from nemo_engine.model.linear import Fp8Linear
from nemo_engine.model.nemo import ModelInputs, Nemo
from nemo_engine.model.weights import NemoWeights
from nemo_engine.ops import Ops
from nemo_engine.ops.attention import AttentionMeta, Workspace
from nemo_engine.ops.packed import WIDENED_FROM, linear_widened
from nemo_engine.runner.graphs import Capture, DecodeGraph
from nemo_engine.runner.kv_cache import KVCache
from nemo_engine.runner.request_table import RequestTable
from nemo_engine.runner.sampler import Masks, Report, Sampler
from nemo_engine.runner.threads import Cores
from nemo_engine.runner.transfer import Download, staged, to_device
from nemo_engine.step import StepPlan, StepResult

PROMPT_LOGPROB_ROWS = 256  # logits computed at once for prompt log-probabilities: bounds their memory
_SETTLING_TOKENS = 64  # of a step that reaches all cores and libraries

_logger = logging.getLogger("nemo_engine")


@dataclass(frozen=True, slots=True, eq=False)
class StepRows:
    """The R rows of a step, N of which sample: what the host knows of them, and tensors on the device, slices of one upload."""

    num_decodes: int  # the first rows, of one token each
    num_tokens: int
    longest: int  # row, in tokens
    num_pages: int  # of the row that has the most, or more
    slots: Tensor  # (R,) int64
    starts: Tensor  # (R + 1,) int64: each row's first token
    new_index: Tensor  # (R,) int64: where in its page table a row gets a new page
    new_page: Tensor  # (R,) int64: that page, negative for none
    sampled: Tensor  # (N,) int64: the rows that sample
    prefill_pages: tuple[int, ...] | None = None  # of each row after the decodes; None: num_pages each, or less

    @classmethod
    def of(
        cls,
        words: Tensor,
        num_rows: int,
        num_decodes: int,
        num_tokens: int,
        longest: int,
        num_pages: int,
        prefill_pages: tuple[int, ...] | None = None,
    ) -> StepRows:
        """Slice ``words``, laid out as ``pack`` does: each part begins at a multiple of 16 bytes, or kernels would be compiled anew."""
        whole = num_rows + num_rows % 2
        new_index = whole + num_rows // 2 * 2 + 2
        new_page, sampled = new_index + whole, new_index + 2 * whole
        return cls(
            num_decodes,
            num_tokens,
            longest,
            num_pages,
            slots=words[:num_rows],
            starts=words[whole : whole + num_rows + 1],
            new_index=words[new_index : new_index + num_rows],
            new_page=words[new_page : new_page + num_rows],
            sampled=words[sampled:],
            prefill_pages=prefill_pages,
        )

    @staticmethod
    def pack(
        slots: Sequence[int], counts: Sequence[int], new_pages: dict[int, tuple[int, int]], sampled: Sequence[int]
    ) -> list[int]:
        """The words of rows with ``counts`` tokens each. new_pages: {slot: (index, page)}."""
        starts = [0]
        for count in counts:
            starts.append(starts[-1] + count)
        entries = [new_pages.get(slot, (0, -1)) for slot in slots]
        odd, even = ([0], []) if len(slots) % 2 else ([], [0])  # what fills parts up
        return [
            *slots, *odd, *starts, *even, *[index for index, _ in entries], *odd, *[page for _, page in entries], *odd,
            *sampled,
        ]  # fmt: skip


class Handle:
    """A launched step. On the CPU it is done when launched; on CUDA ``result`` waits for it."""

    def __init__(
        self, plan: StepPlan, tokens: Tensor, reports: list[Report], prompt_reports: dict[int, list[Report]]
    ) -> None:
        self._step_id = plan.step_id
        self._tokens = Download(tokens)
        self._reports = reports
        self._prompt_reports = prompt_reports

    def result(self) -> StepResult:
        """Wait for the step and return what came out of it."""
        tokens = self._tokens.tolist()
        entries = [entry for report in self._reports for entry in report.entries()]
        logprobs = {row: entry for row, entry in entries if tokens[row] >= 0}
        prompt_logprobs = {
            index: [entry for report in reports for _, entry in report.entries()]
            for index, reports in self._prompt_reports.items()
        }
        return StepResult(self._step_id, tokens, logprobs, prompt_logprobs)


class Runner:
    """The device half. ``num_pages`` usable pages, contexts of up to ``max_model_len`` tokens; ``without_token`` as ``Sampler`` takes it."""

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
        self._ops = ops
        self._page_size = config.page_size
        self._max_num_seqs = config.max_num_seqs
        self._max_num_batched_tokens = config.tokens_per_step(device.type)
        self._max_model_len = max_model_len
        self._model = Nemo(model_config, weights, ops, max_model_len)
        self._kv_cache = KVCache(model_config, num_pages, config.page_size, kv_dtype, device)
        self._table = RequestTable(
            config.max_num_seqs, max_model_len, config.page_size, num_pages, model_config.vocab_size, device
        )
        page_bytes = self._kv_cache.num_bytes // (num_pages + 1)
        is_cpu = device.type == "cpu"
        adapts_below = _adapts_below(weights, ops)
        self._cores = Cores(weights.num_bytes, page_bytes, adapts_below=adapts_below) if is_cpu else None
        self._sampler = Sampler(config.max_num_seqs, model_config.vocab_size, ops, device, without_token)
        self._prompt_lens: dict[int, int] = {}  # slots that want prompt log-probabilities -> their prompt's length
        self._workspace = Workspace()
        self._graphs: tuple[DecodeGraph, ...] = ()
        # The decode rows uploaded last, if none got a page in that step: what they follow from (slots, size, changes of the table), and rows.
        self._last: tuple[tuple[int, ...], int, int, StepRows] | None = None

    @torch.inference_mode()
    def launch(self, plan: StepPlan) -> Handle:
        """Compute ``plan``; see ``step`` for what a plan means."""
        for fill in plan.fills:
            self._table.fill(fill)
            self._sampler.fill(fill)
            self._prompt_lens.pop(fill.slot, None)
            if fill.params.prompt_logprobs is not None:
                self._prompt_lens[fill.slot] = fill.num_prompt_tokens
        new_pages = self._table.take_new_pages(plan)
        launch = self._launch_rows if plan.prefills else self._launch_decodes
        if self._cores is None:
            return launch(plan, new_pages)
        slots = [*plan.decode_slots, *[row.slot for row in plan.prefills]]
        with self._cores.step(plan.num_tokens, sum([self._table.num_pages[slot] for slot in slots])):
            return launch(plan, new_pages)

    def _launch_rows(self, plan: StepPlan, new_pages: dict[int, tuple[int, int]]) -> Handle:
        slots = [*plan.decode_slots, *[row.slot for row in plan.prefills]]
        counts = [1] * len(plan.decode_slots) + [row.num_tokens for row in plan.prefills]
        num_decodes = len(plan.decode_slots)
        sampled = [*range(num_decodes)]
        sampled += [num_decodes + index for index, row in enumerate(plan.prefills) if row.samples]
        words = to_device(StepRows.pack(slots, counts, new_pages, sampled), self._device)
        num_pages = max(self._table.num_pages[slot] for slot in slots)
        prefill_pages = tuple([self._table.num_pages[row.slot] for row in plan.prefills])
        rows = StepRows.of(words, len(slots), num_decodes, sum(counts), max(counts), num_pages, prefill_pages)
        x, residual, seq_lens = self._forward(rows)
        prompt_reports = self._prompt_reports(plan, x, residual) if self._prompt_lens else {}
        last = rows.starts[1:][rows.sampled] - 1
        sampling = tuple(slots[row] for row in sampled)
        tokens, reports = self._choose(rows, sampling, x[last], residual[last], seq_lens, plan.masks)
        return Handle(plan, tokens, reports, prompt_reports)

    def _launch_decodes(self, plan: StepPlan, new_pages: dict[int, tuple[int, int]]) -> Handle:
        slots = plan.decode_slots
        graph = next((graph for graph in self._graphs if graph.size >= len(slots)), None)
        rows = self._decode_rows(slots, new_pages, graph)
        if graph is None:
            x, residual, seq_lens = self._forward(rows)
            tokens, reports = self._choose(rows, slots, x, residual, seq_lens, plan.masks)
            return Handle(plan, tokens, reports, {})
        if self._sampler.needs_only_tokens(slots, plan.masks):
            graph.whole.replay()
            return Handle(plan, graph.whole.outputs[: len(slots)], [], {})
        graph.forward.replay()
        slot_ids, sampled, logits, seq_lens = (
            x[: len(slots)] for x in (rows.slots, rows.sampled, *graph.forward.outputs)
        )
        tokens, reports = self._sampler.sample(logits, slots, slot_ids, seq_lens, self._table.token_ids, plan.masks)
        self._advance(slot_ids, seq_lens, sampled, tokens)
        return Handle(plan, tokens, reports, {})

    def _decode_rows(
        self, slots: tuple[int, ...], new_pages: dict[int, tuple[int, int]], graph: DecodeGraph | None
    ) -> StepRows:
        """The rows on the device, in the graph's own words if there is one: uploaded only if they changed since the step before."""
        size = len(slots) if graph is None else graph.size
        changes = self._table.num_changes
        if self._last is not None and self._last[:3] == (slots, size, changes):
            return self._last[3]
        self._last = None
        padded = [*slots, *[0] * (size - len(slots))]
        packed = StepRows.pack(padded, [1] * size, new_pages, range(size))
        if graph is None:
            words = to_device(packed, self._device)
            num_pages = max([self._table.num_pages[slot] for slot in slots], default=0)
        else:
            words, num_pages = graph.words, self._table.page_table.shape[1]
            words.copy_(staged(packed, self._device), non_blocking=True)
        rows = StepRows.of(words, size, size, size, 1, num_pages)
        if not new_pages:
            self._last = (slots, size, changes, rows)
        return rows

    def _forward(self, rows: StepRows) -> tuple[Tensor, Tensor, Tensor]:
        """Run the model. Returns the last MLP's output and the residual, (T, H) each, and each row's new length (R,)."""
        table = self._table
        ids, positions, mapping, seq_lens = self._ops.build_batch_(
            table.token_ids, table.num_computed, table.page_table, rows.slots, rows.starts, rows.new_index, rows.new_page,
            self._page_size, rows.num_tokens, rows.longest,
        )  # fmt: skip
        meta = AttentionMeta(
            rows.num_decodes, rows.starts, seq_lens, table.page_table, rows.slots, self._page_size, rows.num_pages,
            rows.longest, self._workspace, rows.prefill_pages,
        )  # fmt: skip
        x, residual = self._model.forward(ModelInputs(ids, positions, mapping, meta), self._kv_cache.layers)
        return x, residual, seq_lens

    def _choose(
        self, rows: StepRows, slots: tuple[int, ...], x: Tensor, residual: Tensor, seq_lens: Tensor, masks: Masks
    ) -> tuple[Tensor, list[Report]]:
        """Sample the rows ``rows.sampled``, of ``slots``, and end the step. x, residual: (N, H); seq_lens: (R,)."""
        tokens: Tensor = rows.sampled
        reports: list[Report] = []
        if slots:
            logits = self._model.logits(x, residual)
            slot_ids, positions = rows.slots, seq_lens
            if len(rows.sampled) < len(rows.slots):
                slot_ids, positions = slot_ids[rows.sampled], positions[rows.sampled]
            tokens, reports = self._sampler.sample(logits, slots, slot_ids, positions, self._table.token_ids, masks)
        self._advance(rows.slots, seq_lens, rows.sampled, tokens)
        return tokens, reports

    def _advance(self, slot_ids: Tensor, seq_lens: Tensor, sampled: Tensor, tokens: Tensor) -> None:
        """End the step: the rows' new lengths, and the tokens of those that sampled, enter the table."""
        self._ops.advance_(self._table.token_ids, self._table.num_computed, slot_ids, seq_lens, sampled, tokens)

    def _prompt_reports(self, plan: StepPlan, x: Tensor, residual: Tensor) -> dict[int, list[Report]]:
        found: dict[int, list[Report]] = {}
        begin = len(plan.decode_slots)
        for index, row in enumerate(plan.prefills):
            prompt_len = self._prompt_lens.get(row.slot, 0)
            count = min(row.num_tokens, prompt_len - 1 - row.start)  # positions whose next token is a prompt token
            reports = []
            for first in range(0, count, PROMPT_LOGPROB_ROWS):
                last = min(first + PROMPT_LOGPROB_ROWS, count)
                logits = self._model.logits(x[begin + first : begin + last], residual[begin + first : begin + last])
                targets = self._table.token_ids[row.slot, row.start + first + 1 : row.start + last + 1].long()
                reports.append(self._sampler.report_prompt(logits, targets, row.slot))
            if reports:
                found[index] = reports
            begin += row.num_tokens
        return found

    # ---- start-up and end

    @torch.inference_mode()
    def settle(self) -> None:
        """Make this thread the one that runs all steps, beside others that compute: call it there, before the first step.

        Libraries keep some things per thread (cuBLAS its handle and workspace, OpenMP its pool): a step of padding makes them now.
        """
        for counts in (_padding_rows(min(_SETTLING_TOKENS, self._max_num_batched_tokens), self._max_model_len), [1]):
            self._run_padding(counts)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    def warm_up(self, sizes: Sequence[int]) -> None:
        """Run every kind of step once on padding alone, so that every kernel is compiled and the largest step's memory is taken.

        sizes: those that will be captured. Others are run at each power of two, where implementations may change, and at the most.
        """
        for rows in sorted({*_powers_of_two(self._max_num_seqs), *sizes}):
            self._run_padding([1] * rows)
        for tokens in _powers_of_two(self._max_num_batched_tokens):
            self._run_padding(_padding_rows(tokens, self._max_model_len))

    def _run_padding(self, counts: list[int]) -> None:
        """A step of rows of slot 0. Only its page 0 is written."""
        packed = StepRows.pack([0] * len(counts), counts, {}, range(min(len(counts), self._max_num_seqs)))
        decodes = len(counts) if max(counts) == 1 else 0
        words = to_device(packed, self._device)
        num_pages = self._table.page_table.shape[1] if max(counts) > 1 else 1
        rows = StepRows.of(words, len(counts), decodes, sum(counts), max(counts), num_pages)
        x, residual, seq_lens = self._forward(rows)
        last = rows.starts[1:][rows.sampled] - 1
        logits = self._model.logits(x[last], residual[last])
        slot_ids, positions = rows.slots[rows.sampled], seq_lens[rows.sampled]
        self._sampler.sample_any(logits.float(), slot_ids, positions)  # as edited logits are
        tokens = self._sampler.sample_any(logits, slot_ids, positions)
        self._ops.top_logprobs(logits, tokens, 1)
        self._advance(rows.slots, seq_lens, rows.sampled, tokens)

    @torch.inference_mode()
    def capture(self, sizes: Sequence[int], capture: Capture) -> None:
        """Capture decode steps of ``sizes`` rows; the largest first, so that the others find room in its memory."""
        graphs = []
        for size in sorted(sizes, reverse=True):
            packed = StepRows.pack([0] * size, [1] * size, {}, range(size))
            words = to_device(packed, self._device)
            rows = StepRows.of(words, size, size, size, 1, self._table.page_table.shape[1])

            def forward(rows: StepRows = rows) -> tuple[Tensor, Tensor]:
                x, residual, seq_lens = self._forward(rows)
                return self._model.logits(x, residual), seq_lens

            def whole(rows: StepRows = rows) -> Tensor:
                logits, seq_lens = forward(rows)
                tokens = self._sampler.sample_any(logits, rows.slots, seq_lens)
                self._advance(rows.slots, seq_lens, rows.sampled, tokens)
                return tokens

            graphs.append(DecodeGraph(size, words, capture(whole), capture(forward)))
        self._graphs = tuple(sorted(graphs, key=lambda graph: graph.size))
        self._workspace.freeze()

    def count_saturated(self) -> tuple[int, int]:
        """See ``KVCache.count_saturated``; of the pages that requests have had."""
        return self._kv_cache.count_saturated(self._table.highest_page)

    def recover(self) -> None:
        """A step failed: forget the rows of the step before, and wait for the device. Raises what it says if it is lost."""
        self._last = None
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def close(self) -> None:
        """Drop all tensors and graphs, also if the device is lost; says so if an FP8 cache's scales were too small."""
        try:
            self._kv_cache.warn_if_saturated(self._table.highest_page)
        finally:
            self._graphs = ()
            self._last = None
            del self._model, self._kv_cache, self._table, self._sampler, self._workspace
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
                torch.cuda.empty_cache()


def _padding_rows(num_tokens: int, longest: int) -> list[int]:
    """Lengths of rows, of at most ``longest``, that are ``num_tokens`` together."""
    whole, rest = divmod(num_tokens, longest)
    return [longest] * whole + [rest] * (rest > 0)


def _adapts_below(weights: NemoWeights, ops: Ops) -> float:
    """From how many tokens on a CPU multiplies in fp32, whose sums the number of threads splits; infinity if never. FP8 is computed so too."""
    if weights.embed_tokens.dtype.itemsize > 2 or isinstance(weights.layers[0].qkv, Fp8Linear):
        return 0
    return WIDENED_FROM if ops.linear is linear_widened else math.inf


def _powers_of_two(most: int) -> list[int]:
    """1, 2, 4, ... up to ``most``, and ``most`` itself."""
    return [1 << i for i in range((most - 1).bit_length())] + [most]
